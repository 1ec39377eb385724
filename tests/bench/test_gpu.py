"""The page that is written about GPUs. What is measured there needs one."""

from bench.gpu import Found, Timed, page


def product(fused_s: float, cublas_s: float) -> Timed:
    seconds = {"fused": fused_s, "cuBLAS": cublas_s}
    return Timed(what="the product", shape=(8, 4, 2), dtype="bfloat16", flops=1e12, seconds=seconds)


def found(together: list[Timed]) -> Found:
    return Found(
        device="1 × card",
        versions="torch 2",
        ranks=2,
        alone=[product(0.002, 0.001), product(0.001, 0.0009)],
        together=together,
        differences={"matmul_all_reduce": 0.004},
    )


def test_shares_are_of_the_quickest_product_and_targets_are_judged_beside_cublas() -> None:
    text = page(found([]))
    assert "1111 TFLOP/s" in text
    assert "500 (0.45) | 1000 (0.90)" in text
    assert "0.50 of cuBLAS (target 0.85): missed" in text
    assert "0.90 of cuBLAS (target 0.85): reached" in text
    assert "| matmul_all_reduce | 4.0e-03 |" in text


def test_ranks_that_share_a_gpu_are_said_to_show_correctness_only() -> None:
    assert "2 ranks shared one GPU, for correctness only" in page(found([]))


def test_what_torch_has_no_operator_for_is_left_open() -> None:
    row = Timed(
        what="matmul_all_reduce",
        shape=(8, 4, 2),
        dtype="bfloat16",
        flops=1e12,
        seconds={"fused": 0.002, "cuBLAS + NCCL": 0.004},
    )
    text = page(found([row]))
    assert "| matmul_all_reduce | 8 × 4 × 2 | bfloat16 | 500 (0.45) | 250 (0.23) | – |" in text
    assert "correctness only" not in text
