"""The HTTP side. It forwards encoded bytes and never imports torch."""
