"""One round as a value: `conclude` decides, the loop brings replies.

`state.py` is what goes from round to round, `round.py` who was asked. `conclude.py` turns replies into the next
state: each passes the `door`, then come rule, server optimiser, candidate election and bounds. `round_loop.py` drives
it over a grid: it asks (`requests`, `roster`) and waits (`arrivals`, `round_size`). `record.py` is what is written
down.
"""
