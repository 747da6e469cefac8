"""The way of a conversation: from records to supervised tokens."""
