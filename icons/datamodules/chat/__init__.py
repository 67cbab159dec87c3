"""Conversations -> token ids and labels: templates, tokenizers, processors."""
