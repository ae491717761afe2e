"""Other servers with the same model, transform and answers, each in an environment of its own.

A module here runs in its rival's interpreter, which has no Vitrail: `options`, `classifier` and
`forms` are all that it imports from this repository.
"""
