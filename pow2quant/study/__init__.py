"""Questions that take many runs to answer: which tensor needs how many bits, which method or parameter is best."""
