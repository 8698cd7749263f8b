"""Engines that train many clients at once and give each client the result it would have if it trained alone.

An engine cuts the clients of a push (one call of Flower's `Grid.push_messages`) into blocks. All clients of a block
train together: their batches pass through the model side by side, and every client has its own weights. The engine
`serial`, which needs no code here, trains one client after another and is the reference for the results.

Entry points

- `cohort_app`: the client app that passes the training messages of a push to an engine and returns the replies.
- `factory`: chooses the engine for a model.
- `trial`: checks in a small trial that an engine trains as `serial` does.
- `kept`: what the clients of a block keep between rounds.

Blocks of clients

- `blocks`: cuts the clients of a push into blocks and gives the rules access to a trained block.
- `batches`: the batches that each client of a block draws, padded to one shape.
- `block_result`: the trained models of a block and the metrics of its clients.

Where a block is trained

- `engine`: the `Engine` protocol, and the engines that train in this process, on one device or on several.
- `workers`: the engine that trains in forked worker processes.
- `remote_block`: a trained block in the memory of a worker process, and the queries to that process.

How a block is trained

- `program`: trains a block with layers that hold one set of weights per client.
- `vmapped`: trains a block with `torch.func.vmap`, for models that `program` does not support.
- `tracing`: traces a model into a graph of layers and checks that no operation mixes the examples of a batch.
- `examplewise`: the layers and functions that are known to process examples independently.
- `client_layers`: the registry of client layers, and the replacement of a traced model's layers by them.
- `layers`: the base class of client layers.
- `linear`, `convolution`, `dropout`, `norms`, `embedding`, `recurrent`: the client layers.
- `backprop`: the forward and the backward pass through client layers, by hand or with autograd.
- `optimizer`: torch's optimisers, applied to the weights of all clients at once.

How the weights of a layer are stored

- `weight_forms`: the interface of a weight form, and the dense form (one full weight per client).
- `low_rank`: weights stored as low-rank updates over the inputs that the layer has seen.
- `gram_weights`: weights of the first layer, stored as low-rank updates over the examples of each client.
- `gram_products`: the inner products of each client's examples, which `gram_weights` needs.
- `selection`: selects the rows of a batch from the tables of `gram_weights`.

How a convolution is computed

- `patches`: as matrix products with image patches.
- `frequencies`: through a Fourier transform along the rows of the images.
"""
