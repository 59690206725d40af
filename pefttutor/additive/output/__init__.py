"""Methods that add something to what a model says: to its logits, from outside (chapter 4.2.3)."""
