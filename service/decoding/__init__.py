"""Decoding of images in processes that can be killed. Nothing here imports torch.

pool.py      in the worker: gives each image to a free process, and replaces those that die
process.py   in the worker: one process, and what it is sent
memory.py    the memory that both sides share: an encoded image, then its pixels
messages.py  what they send each other about it
decoder.py   the process itself
"""
