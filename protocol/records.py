"""The names that server and sites use in their messages; the same as Flower's built-in strategies."""

from __future__ import annotations

from typing import Final

ARRAYS: Final = "arrays"  # ArrayRecord: the model's state dict
CONFIG: Final = "config"  # ConfigRecord: server -> site
METRICS: Final = "metrics"  # MetricRecord: site -> server

EXAMPLES: Final = "num-examples"  # metric: how many examples the site trained or evaluated on
ROUND: Final = "server-round"  # config: the round, from 1
