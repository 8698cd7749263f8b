"""The rounds of a run: the function `conclude` decides a round, and the round loop collects its replies.

`state.py` holds the values that pass from round to round, `round.py` the messages that a round has sent.
`conclude.py` computes the next state from the replies: each reply must pass the `door`, the rule aggregates the
admitted replies, and the server optimiser, the candidate election and a check for finite numbers complete the model.
`round_loop.py` runs the rounds on a grid: it sends messages to sampled nodes (`requests`, `roster`) and waits for
replies (`arrivals`, `round_size`).
`record.py` defines the record of a round that goes into the journal.
"""
