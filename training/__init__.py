"""Training of the demo model: image generator, tokenizer, model, training and evaluation."""
