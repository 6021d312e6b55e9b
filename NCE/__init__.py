"""Memory banks and losses of contrastive multiview coding."""
