"""Engines: many clients trained at once, with the results that each would have by itself.

From the outside in: `app` answers messages, `blocks` cuts a round into blocks of clients, and `making` chooses who
trains them: an `engine` in this process, or `workers` in others (`remote` is what the two say to each other).

A block is trained by a `program`, or by `vmapped` where the module's code cannot be followed. For a program the code is
followed (`reading`), its layers are `turning` into ones that know all clients (`layers`, `convolution`), and a `chain`
goes forward and back through them; `recorded` does the same again on a GPU. It takes its `batches` in steps, the
`optimizer` moves what they teach, and `trained` is what comes of it.

A layer's weights take one of the `forms`: written out, or `factors`, for a first layer `on_examples` (with their
`products`, and `selection` for the rows of a batch). A convolution takes one of several ways: `frequencies`, `patches`,
or the library's. `room` is memory that is used again.
"""
