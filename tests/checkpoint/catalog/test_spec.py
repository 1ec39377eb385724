"""The specification language: what it means, what ships with the library, and what it refuses."""

from pathlib import Path

import pytest

from resilient.checkpoint.catalog.cut import Cut, Padded, Shard, SubParameters
from resilient.checkpoint.catalog.spec import PRESETS, parse_spec, preset
from resilient.errors import LayoutMismatch, UsageError

ROOT = Path(__file__).parents[3]
MESH = '[mesh]\naxes = ["pp", "dp", "tp"]\nsizes = { tp = 2, dp = 3 }\n'
LLAMA = {
    "model.embed_tokens.weight": (64, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.k_proj.weight": (4, 8),
    "model.layers.0.self_attn.v_proj.weight": (4, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.gate_proj.weight": (16, 8),
    "model.layers.0.mlp.up_proj.weight": (16, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 16),
    "model.layers.0.input_layernorm.weight": (8,),
    "lm_head.weight": (64, 8),
}
EXPERTS = {
    f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight": (4, 4)
    for layer in range(2)
    for expert in range(2)
    for name in ("w1", "w2", "w3")
}


def cut_text(body: str) -> str:
    return MESH + "[[cut]]\n" + body


def test_a_cut_means_what_it_says() -> None:
    spec = parse_spec(
        cut_text(
            """
            pattern = ["*.qkv.weight", "*.qkv.bias"]
            sharded = [{ dim = 0, over = "pp" }, { dim = 0, over = "tp" }]
            sub_parameters = { dim = 0, widths = [4, 1, 1] }
            padded = { dim = 1, size = 7 }
            """
        )
    )
    cut = spec.cut_of("h.0.qkv.bias")
    assert (cut.how, cut.shards) == ("sharded", (Shard(0, "pp"), Shard(0, "tp")))
    assert (cut.sub_parameters, cut.padded) == (SubParameters(0, (4, 1, 1)), Padded(1, 7))
    assert (cut.over(0), cut.over(1)) == (("pp", "tp"), ())


def test_a_star_is_any_text_and_the_whole_name_must_match() -> None:
    spec = parse_spec(cut_text('pattern = "*.w?"\nunique = true\n') + "[[cut]]\nregex = 'a\\.(b|c)'\nreplicated = true")
    assert spec.cut_of("x.y.z.w1").how == "unique"
    assert spec.cut_of("a.c").how == "replicated"
    for name in ("x.w11", "a.d", "xa.b"):
        with pytest.raises(UsageError, match=f"no cut matches {name}"):
            spec.cut_of(name)


def test_ranks_are_numbered_along_the_last_axis_first() -> None:
    spec = parse_spec(MESH)
    assert spec.coordinates(7, {"pp": 2}) == {"pp": 1, "dp": 0, "tp": 1}
    assert spec.coordinates(5, {"pp": 1, "dp": 6, "tp": 1}) == {"pp": 0, "dp": 5, "tp": 0}
    with pytest.raises(UsageError, match="size of the mesh axis 'pp' is not known"):
        spec.coordinates(7)
    with pytest.raises(UsageError, match="fewer ranks"):
        spec.coordinates(12, {"pp": 2})


def test_an_own_cut_comes_before_that_of_the_preset() -> None:
    spec = parse_spec('preset = "llama"\n[[cut]]\npattern = "*.q_proj.weight"\nreplicated = true', "job.toml")
    assert spec.axes == ("pp", "dp", "tp")
    assert spec.cut_of("model.layers.0.self_attn.q_proj.weight").how == "replicated"
    assert spec.cut_of("model.layers.0.self_attn.k_proj.weight").how == "sharded"
    assert spec.cut_of("model.norm.weight").text == "otherwise = 'replicated'"


def test_a_preset_may_say_more_than_a_model_needs() -> None:
    fused = {"model.layers.0.self_attn.qkv_proj.weight": (12, 4)}
    own = '[[cut]]\npattern = "*.qkv_proj.weight"\nsharded = { dim = 0, over = "tp" }'
    parse_spec(f'preset = "llama"\n{own}').check(fused)
    with pytest.raises(UsageError, match="q_proj.weight.* matches no parameter"):
        parse_spec(preset("llama")).check(fused)


def test_presets_of_presets_come_last() -> None:
    spec = parse_spec('preset = "megatron-swiglu"\n[[cut]]\npattern = "*.0.mlp.linear_fc1.weight"\nunique = true')
    assert spec.cut_of("decoder.layers.0.mlp.linear_fc1.weight").how == "unique"
    assert spec.cut_of("decoder.layers.1.mlp.linear_fc1.weight").sub_parameters == SubParameters(0, (1, 1))
    assert spec.cut_of("decoder.layers.1.mlp.linear_fc2.weight").shards == (Shard(1, "tp"),)
    assert spec.with_vocabulary(9).cut_of("output_layer.weight").padded == Padded(0, 9)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_be_read(name: str) -> None:
    assert parse_spec(preset(name), name).cut_of("model.norm.weight").how == "replicated"


def test_every_preset_is_listed_and_told_of() -> None:
    folder = ROOT / "checkpoint" / "catalog" / "presets"
    assert sorted(path.stem for path in folder.iterdir()) == sorted(PRESETS)
    assert all(f"`{name}`" in (ROOT / "docs" / "spec.md").read_text() for name in PRESETS)
    with pytest.raises(UsageError, match="no preset 'gpt2'; there are gpt-neox"):
        preset("gpt2")


def test_the_presets_fit_the_shapes_that_they_are_for() -> None:
    parse_spec(preset("llama") + "[mesh.sizes]\ntp = 4").check(LLAMA)
    attention = {name: shape for name, shape in LLAMA.items() if ".mlp." not in name}
    parse_spec(preset("mixtral") + "[mesh.sizes]\ntp = 2").check(attention | EXPERTS)
    with pytest.raises(
        LayoutMismatch, match=r"k_proj.weight of shape \(4, 8\): \[4\] elements .* divided by 8, over tp"
    ):
        parse_spec(preset("llama") + "[mesh.sizes]\ntp = 8").check(LLAMA)


def test_no_two_cuts_of_a_preset_match_one_parameter() -> None:
    names = {
        "gpt-neox": "gpt_neox.layers.0.{}",
        "megatron": "language_model.encoder.layers.0.{}",
        "megatron-swiglu": "decoder.layers.0.{}",
        "llama": "model.layers.0.{}",
        "mixtral": "model.layers.0.block_sparse_moe.{}",
    }
    ends = """attention.query_key_value.weight attention.dense.weight attention.dense.bias mlp.dense_h_to_4h.bias
        mlp.dense_4h_to_h.weight self_attention.linear_qkv.layer_norm_weight self_attention.linear_proj.weight
        mlp.linear_fc1.weight mlp.linear_fc2.weight mlp.local_experts.0.linear_fc1.weight self_attn.qkv_proj.weight
        mlp.gate_up_proj.weight mlp.up_proj.weight experts.0.w1.weight experts.gate_up_proj experts.down_proj""".split()
    for name, place in names.items():
        spec = parse_spec(preset(name), name)
        for end in ends:
            spec.cut_of(place.format(end))  # raises where two do


def test_gated_units_are_cut_half_by_half() -> None:
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert parse_spec(preset("megatron")).cut_of(name).sub_parameters is None
    assert parse_spec(preset("megatron-swiglu")).cut_of(name).sub_parameters == SubParameters(0, (1, 1))


def test_the_vocabulary_can_be_told_later() -> None:
    spec = parse_spec(preset("megatron"))
    assert spec.cut_of("embedding.word_embeddings.weight").padded == Padded(0, None)
    assert spec.with_vocabulary(50257).cut_of("embedding.word_embeddings.weight").padded == Padded(0, 50257)


def test_layers_and_experts_are_numbered_on_over_stages_of_any_depth() -> None:
    spec = parse_spec(preset("megatron"))
    ranks = [
        ({"pp": 0, "ep": 0}, ["layers.0.local_experts.0.w", "layers.0.local_experts.1.w"]),
        ({"pp": 0, "ep": 1}, ["layers.0.local_experts.0.w"]),
        ({"pp": 1, "ep": 0}, ["layers.0.norm", "layers.1.local_experts.0.w", "head"]),
        ({"pp": 1, "ep": 1}, ["layers.0.norm", "layers.1.local_experts.0.w", "head"]),
        ({"pp": 2, "ep": 0}, ["layers.0.norm"]),
    ]
    assert [list(found.values()) for found in spec.global_names(ranks)] == [
        ["layers.0.local_experts.0.w", "layers.0.local_experts.1.w"],
        ["layers.0.local_experts.2.w"],
        ["layers.1.norm", "layers.2.local_experts.0.w", "head"],
        ["layers.1.norm", "layers.2.local_experts.1.w", "head"],
        ["layers.3.norm"],
    ]


def test_state_is_cut_like_its_parameter() -> None:
    cut = Cut(how="sharded", shards=(Shard(0, "ep"), Shard(2, "tp")), padded=Padded(0, 5))
    assert cut.of_state("x.exp_avg", (4, 3, 2), (4, 3, 2)) is cut
    assert cut.of_state("x.step", (4, 3, 2), ()) == Cut()
    rows = cut.of_state("x.exp_avg_sq_row", (4, 3, 2), (4, 3))
    assert (rows.how, rows.averaged, rows.shards, rows.padded) == ("averaged", ("tp",), (Shard(0, "ep"),), Padded(0, 5))
    columns = cut.of_state("x.exp_avg_sq_col", (4, 3, 2), (4, 2))
    assert (columns.how, columns.shards) == ("sharded", (Shard(0, "ep"), Shard(1, "tp")))
    with pytest.raises(LayoutMismatch, match=r"x.odd of shape \(7,\) is state of a parameter of shape \(4, 3, 2\)"):
        cut.of_state("x.odd", (4, 3, 2), (7,))


def test_rows_and_columns_of_a_square_are_told_apart_by_their_names() -> None:
    cut = Cut(how="sharded", shards=(Shard(0, "tp"),))
    assert cut.of_state("layers.0.col_proj.weight.exp_avg_sq_row", (4, 4), (4,)).shards == (Shard(0, "tp"),)
    assert cut.of_state("layers.0.row_proj.weight.exp_avg_sq_col", (4, 4), (4,)).averaged == ("tp",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.w", "a.b"], "no cut matches a.b"),
        (["b.x"], r"pattern \*.w matches no parameter"),
        (["a.w", "a.w.w"], r"a.w.w is matched by pattern \*.w and pattern a.w.\*"),
    ],
)
def test_a_specification_that_does_not_fit_the_model_is_refused(names: list[str], message: str) -> None:
    text = (
        cut_text('pattern = "*.w"\nreplicated = true\n') + '[[cut]]\npattern = "a.w.*"\nunique = true\noptional = true'
    )
    text += '\n[[cut]]\npattern = "b.*"\nunique = true\noptional = true'
    with pytest.raises(UsageError, match=message):
        parse_spec(text, "job.toml").check(names)


@pytest.mark.parametrize(
    ("body", "shape", "message"),
    [
        ('sharded = { dim = 0, over = "tp" }', (3, 2), r"\[3\] elements along dimension 0 .* divided by 2, over tp"),
        ('sharded = { dim = 1, over = "tp" }', (4,), "w has 1 dimensions; .* speaks of dimension 1"),
        (
            'sharded = { dim = 0, over = "tp" }\nsub_parameters = { dim = 0, widths = [2, 1] }',
            (9,),
            r"\[6, 3\] elements along dimension 0",
        ),
        (
            "replicated = true\nsub_parameters = { dim = 0, widths = [2, 2] }",
            (6,),
            "not to be divided into sub-parameters",
        ),
        (
            'sharded = [{ dim = 0, over = "dp" }, { dim = 0, over = "tp" }]',
            (10,),
            "divided by 6, over dp and tp",
        ),
    ],
)
def test_a_shape_that_does_not_divide_is_refused(body: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(LayoutMismatch, match=message):
        parse_spec(cut_text('pattern = "w"\n' + body)).check({"w": shape})


def test_what_is_padded_need_not_divide() -> None:
    text = cut_text('pattern = "w"\nsharded = { dim = 0, over = "tp" }\n')
    parse_spec(text + "padded = { dim = 0, size = 7 }").check({"w": (7, 2)})
    with pytest.raises(LayoutMismatch, match="divided by 2"):
        parse_spec(text).check({"w": (7, 2)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[cut", "job.toml is no TOML"),
        ("cuts = 1", "a specification has no key 'cuts'"),
        ('preset = "gpt2"', "no preset 'gpt2'"),
        ('otherwise = "sharded"', "otherwise is replicated or unique, not 'sharded'"),
        ("mesh = 3", "mesh is a table with axes, sizes, not 3"),
        ('[mesh]\naxes = ["tp", "tp"]', "names an axis twice"),
        ('[mesh]\naxes = ["tp", 3]', "mesh.axes is a text or a list of texts"),
        ('[mesh]\naxes = ["tp"]\nsizes = { tp = 0 }', "mesh.sizes.tp is a whole number from 1 on, not 0"),
        ('[mesh]\naxes = ["tp"]\nsizes = { dp = 1 }', "mesh.sizes: the mesh has no axis 'dp'; it has tp"),
        ('[mesh]\naxes = ["tp"]\nsizes = 3', "mesh.sizes"),
        ("cut = 3", r"write \[\[cut\]\]"),
        ("cut = [3]", r"\[\[cut\]\] number 1 is a table"),
        ("[[cut]]\nreplicated = true", "either `pattern`, with . and ., or `regex`"),
        ('[[cut]]\npattern = "a"\nregex = "a"\nreplicated = true', "either `pattern`"),
        ('[[cut]]\nregex = "("\nreplicated = true', "number 1: "),
        ('[[cut]]\npattern = []\nreplicated = true', "pattern is a text or a list of texts"),
        ('[[cut]]\npattern = "a"', "the cut for pattern a says nothing; it says one of replicated"),
        ('[[cut]]\npattern = "a"\nreplicated = true\nunique = true', "says .*replicated.*unique"),
        ('[[cut]]\npattern = "a"\nreplicated = 1', "`replicated` is true or not there"),
        ('[[cut]]\npattern = "a"\nreplicated = true\noptional = 1', "`optional` is true or false"),
        ('[[cut]]\npattern = "a"\nsharded = true', "sharded is a table with dim, over"),
        ('[[cut]]\npattern = "a"\nsharded = []', "is over no axis, or over one twice"),
        ('[[cut]]\npattern = "a"\nsharded = { dim = 0, over = "tp" }', "the mesh has no axis 'tp'; it has none"),
        ('[[cut]]\npattern = "a"\nsharded = { dim = -1, over = "tp" }', "dim is a whole number from 0 on, not -1"),
        ('[[cut]]\npattern = "a"\naveraged = true', "averaged is a table with over"),
        ('[[cut]]\npattern = "a"\nreplicated = true\nsub_parameters = { dim = 0, widths = [1] }', "two or more"),
        ('[[cut]]\npattern = "a"\nreplicated = true\npadded = { dim = 0, size = 0 }', "size is a whole number from 1"),
        ('[[numbered]]\npattern = "*.layers.*"\nover = "pp"', "with {number} in it once"),
        ('[[numbered]]\npattern = "*.layers.{number}.*"\nover = "pp"', "the mesh has no axis 'pp'"),
    ],
)  # fmt: skip
def test_what_a_specification_cannot_mean_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_spec(text, "job.toml")
