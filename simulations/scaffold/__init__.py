"""The templates of `corymb new`, and the checks of `corymb.testing.check_rule`."""
