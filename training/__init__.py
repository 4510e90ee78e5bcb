"""Training of the demo model: picture generator, tokenizer, model, training and evaluation."""
