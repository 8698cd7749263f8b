"""Words in journals that are no codes of rejections; without imports, so that pages need no torch to read them."""

ADMITTED = "admitted"
SILENT = "silent"
KEPT_MODEL = {  # notes of a round in which admitted replies did not change the model, and why
    "too-few-replies": "the rule needs more replies",
    "not-finite": "the rule's result was not finite",
}
BELOW_QUORUM = "below-quorum"  # a note of a round that was abandoned; its value is the quorum
