"""Heads turn a trunk's output into a task's answer. One file each."""
