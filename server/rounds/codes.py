"""Words in journals that are no codes of rejections; without imports, so that pages need no torch to read them."""

ADMITTED = "admitted"
SILENT = "silent"
BELOW_QUORUM = "below-quorum"  # a note of a round that was abandoned; its value is the quorum
