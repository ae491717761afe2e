"""The worker side: everything between an encoded image and its named arrays."""
