"""Tables of settings as the flat keys of a run config, and back."""

from __future__ import annotations

import pytest

from corymb.protocol.run_config import flatten, nest


def test_tables_and_lists_come_back() -> None:
    tables = {"a": {"b": 1, "c": {"d": "x"}}, "rules": [{"name": "fedau"}, {"name": "krum"}], "budgets": [1, 2]}
    assert nest(flatten(tables)) == tables
    assert nest(tables | {"rules": {"0": {"name": "fedau"}}}) == tables | {"rules": [{"name": "fedau"}]}
    assert nest({"train.learning-rate": 0.1}) == {"train": {"learning_rate": 0.1}}


def test_the_name_of_a_site_keeps_its_hyphens_and_dots() -> None:
    enrolled = {"long-beach": 200, "st.mary": 30}
    assert nest(flatten({"policy": {"enrolled": enrolled, "max-norm": 3.0}})) == {
        "policy": {"enrolled": enrolled, "max_norm": 3.0}
    }


@pytest.mark.parametrize("config", [{"rules": "fedau", "rules.name": "x"}, {"rules.name": "x", "rules": "fedau"}])
def test_a_key_that_is_a_value_and_a_table_is_an_error(config: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="run config has"):
        nest(config)
