"""ICONS: pick the training data a vision-language model really needs (influence consensus, arXiv 2501.00654)."""
