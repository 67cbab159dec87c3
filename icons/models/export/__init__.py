"""Export: the adapter merged into the weights, with the tokenizer and processor that other tools read."""
