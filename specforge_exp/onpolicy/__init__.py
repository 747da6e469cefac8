"""Training on what the draft proposes itself: anchors, proposals, the target's verdict."""
