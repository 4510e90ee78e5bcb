"""Decoder, vision towers and audio encoders that families share."""
