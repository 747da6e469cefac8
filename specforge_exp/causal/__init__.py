"""A causal language model in training: next tokens of text (pretrain) or of answers (sft)."""
