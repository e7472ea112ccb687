"""Rows of ScienceQA that a language model can answer."""


def without_picture(rows):
    """The rows (a `datasets.Dataset`) whose question has no picture."""
    return rows.select([i for i, picture in enumerate(rows["image"]) if picture is None])
