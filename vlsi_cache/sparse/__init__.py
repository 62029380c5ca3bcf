"""Sparse rows: the teacher's top-k, the student's loss on them, their quantiser and the layer matching."""
