"""What the migration tests share: data, comparison, and the pages of docs/migrate whose rows they check."""

import re
from pathlib import Path

import numpy as np
import pytest

PAGES = Path(__file__).parents[3] / "docs" / "migrate"
CHANNELS = 3


class Case:
    """A batch, the gradient of its output, and the parameters and statistics of a layer, in float64."""

    def __init__(self, shape=(4, CHANNELS, 5), axis=1):
        rng = np.random.default_rng(sum(shape))
        self.axis = axis
        self.x, self.dy = rng.normal(3.0, 2.0, shape), rng.normal(0.0, 1.0, shape)
        self.gamma, self.beta = rng.normal(1.0, 0.5, CHANNELS), rng.normal(0.0, 1.0, CHANNELS)
        self.mean, self.var = rng.normal(2.0, 1.0, CHANNELS), rng.uniform(0.5, 4.0, CHANNELS)
        self.count = self.x.size // CHANNELS

    def per_channel(self, values):
        """One value per channel, to be broadcast over a batch."""
        shape = [1] * self.x.ndim
        shape[self.axis] = CHANNELS
        return np.reshape(values, shape)

    def sums(self, values):
        """Sums over each channel."""
        return np.moveaxis(values, self.axis, 0).reshape(CHANNELS, -1).sum(1)


@pytest.fixture
def case():
    return Case


@pytest.fixture
def same():
    """Compares arrays by name, with a bound in units of the larger of 1 and what is expected."""

    def same(got, expected, bound=1e-12, what=""):
        got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
        assert got.shape == expected.shape, what
        np.testing.assert_array_less(np.abs(got - expected) / np.maximum(1.0, np.abs(expected)), bound, what)

    return same


@pytest.fixture
def page():
    """Reads a page of docs/migrate."""
    return lambda name: Page((PAGES / f"{name}.md").read_text())


class Page:
    def __init__(self, text):
        self.text = text

    def _blocks(self, language):
        return re.findall(rf"^```{language}\n(.*?)^```$", self.text, re.M | re.S)

    def run(self):
        """Runs the page's one Python block, whose assertions fail here."""
        [block] = self._blocks("python")
        exec(compile(block, "the Python block of the page", "exec"), {})

    def lists(self, language):
        """The lists of numbers in the blocks of a language."""
        number = r"-?\d+\.\d+"
        lists = re.findall(rf"\[({number}(?:, {number})*)\]", "".join(self._blocks(language)))
        return {tuple(float(n) for n in numbers.split(",")) for numbers in lists}
