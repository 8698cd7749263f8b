"""Engines: many clients trained at once, with the results that each would have by itself.

`app` answers messages, `blocks` cuts a round into blocks of clients, `engine` and `workers` train blocks in this
process or in others, `program` is a module for a block of clients, made of `layers` whose weights take one of the
`forms`.
"""
