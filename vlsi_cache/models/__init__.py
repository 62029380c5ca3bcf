"""Models: loading them, their hidden states, the verbalizers, and the depth pruning of a student."""
