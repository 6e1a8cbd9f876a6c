"""The pages of the documentation whose code needs Ray, on the cluster of these tests. The others: tests/unit."""

import pytest

from tests import pages


@pytest.mark.parametrize("page", pages.to_be_run(with_ray=True), ids=pages.name_of)
def test_the_code_of_a_page_runs_as_it_stands(page, cluster, tmp_path):
    pages.run(page, tmp_path, RAY_ADDRESS=cluster.address)
