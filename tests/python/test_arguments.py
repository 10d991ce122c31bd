# SPDX-FileCopyrightText: The attn8 authors
# SPDX-License-Identifier: Apache-2.0
"""Bad input: the right exception, one line that names argument, got and wanted, and no crash."""

import os
import subprocess
import sys

import numpy as np
import pytest
from dense_attention import normal, operands

attn8 = pytest.importorskip("attn8", reason="attn8 is not installed: pip install .")


def unaligned(shape):
    data = np.zeros(int(np.prod(shape)) * 4 + 1, np.uint8)
    return data[1:].view(np.float32).reshape(shape)


class Device:
    """Pretends to live where the library cannot read."""

    shape = (1, 4, 2, 8)

    def __init__(self, device):
        self.device = device

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, **_):
        raise BufferError("cannot")


SHAPE = (1, 4, 2, 8)
X = np.zeros(SHAPE, np.float32)

BAD = [
    ({"q": "x"}, TypeError, "q: got str"),
    ({"q": None}, TypeError, "q: got NoneType"),
    ({"q": [[[[1.0]]]]}, TypeError, "q: got list"),
    ({"q": np.float32(1)}, ValueError, "q: got 0 dimensions, want 4"),
    ({"q": X[0]}, ValueError, "q: got 3 dimensions, want 4"),
    ({"k": X[0]}, ValueError, "k: got 3 dimensions, want 4"),
    ({"v": 3}, TypeError, "v: got int, want an array"),
    ({"q": X.astype(np.float64)}, TypeError, "q: got ndarray of dtype float64, want float32"),
    ({"k": X.astype(np.int32)}, TypeError, "k: got ndarray of dtype int32, want float32"),
    ({"v": X.astype(np.int8)}, TypeError, "v: got ndarray of dtype int8, want float32"),
    ({"v": X.astype(complex)}, TypeError, "v: got ndarray of dtype complex128"),
    ({"v": X.astype(object)}, TypeError, "v: got ndarray of dtype object"),
    ({"q": X.astype(">f4")}, TypeError, "q: got ndarray of dtype >f4"),
    ({"q": np.ma.masked_array(X)}, TypeError, "q: got a MaskedArray, want an array: its mask"),
    ({"seqlens_k": np.array([4])}, TypeError, "seqlens_k: got .* int64, want .*lengths: int32"),
    ({"q": X.astype("U3")}, TypeError, "q: got ndarray of dtype <U3"),
    ({"k": unaligned(SHAPE)}, ValueError, "k: got memory that is not aligned"),
    ({"k": Device((2, 0))}, TypeError, "k: got Device"),
    ({"k": X[:, :, :, :4]}, ValueError, r"k.shape\[3\]=4 must equal q.shape\[3\]=8"),
    ({"k": np.zeros((2, 4, 2, 8), np.float32)}, ValueError, r"k.shape\[0\]=2 must equal"),
    ({"v": X[:, :2]}, ValueError, "v.shape got"),
    ({"q": np.zeros((1, 4, 3, 8), np.float32)}, ValueError, r"k.shape\[2\]=2 .* must divide"),
    ({"layout": "hnd"}, ValueError, "layout: got str 'hnd', want 'bshd' or 'bhsd'"),
    ({"layout": 3}, TypeError, "layout: got int 3, want a str"),
    ({"mode": "best"}, ValueError, 'mode got "best", wants one of accurate paper half exact fp8'),
    ({"mode": None}, TypeError, "mode: got NoneType, want a str"),
    ({"mode": "\ud800"}, ValueError, "mode: got str that is not UTF-8"),
    ({"mode": "x" * 5000}, ValueError, "mode got"),
    ({"softmax_scale": "1"}, TypeError, "softmax_scale: got str '1', want a float or None"),
    ({"softmax_scale": float("nan")}, ValueError, "softmax_scale got nan"),
    ({"softmax_scale": 1e300}, ValueError, "softmax_scale got inf"),
    ({"softmax_scale": 10**400}, TypeError, "softmax_scale: got int"),
    ({"softmax_scale": True}, TypeError, "softmax_scale: got bool"),
    ({"softmax_scale": X}, TypeError, "softmax_scale: got ndarray"),
    ({"causal": 1}, TypeError, "causal: got int 1, want a bool"),
    ({"align": "centre"}, ValueError, "align: got str 'centre', want 'bottom_right'"),
    ({"window_size": 3}, TypeError, r"window_size: got int 3, want \(left, right\)"),
    ({"window_size": (1, 2, 3)}, ValueError, "window_size: got 3 numbers"),
    ({"window_size": (1.5, 2)}, TypeError, r"window_size\[0\]: got float 1.5, want an int"),
    ({"window_size": (0, 2**70)}, ValueError, r"window_size\[1\]: got int 1180591620717411303424"),
    ({"window_size": (-2, 0)}, ValueError, "window_left got -2, wants >= -1"),
    ({"kv_block": 100}, ValueError, "kv_block got 100, wants 0 or a multiple of 64"),
    ({"kv_block": 2**40}, ValueError, "kv_block: got 1099511627776, want an int of 32 bits"),
    ({"kv_block": 64.0}, TypeError, "kv_block: got float 64.0, want an int"),
    ({"v_granularity": "row"}, ValueError, 'got "row"'),
    ({"smooth_k": None}, TypeError, "smooth_k: got NoneType, want a bool"),
    ({"check_finite": "no"}, TypeError, "check_finite: got str 'no', want a bool"),
    ({"fp8_format": "e3m4"}, ValueError, "fp8_format: got str 'e3m4', want 'e4m3' or 'e5m2'"),
    ({"return_lse": 1}, TypeError, "return_lse: got int, want a bool"),
    ({"threads": 0}, ValueError, "threads: got 0, want 1 to 4096"),
    ({"threads": 10**6}, ValueError, "threads: got 1000000, want 1 to 4096"),
    ({"threads": True}, TypeError, "threads: got bool"),
    ({"isa": "neon"}, ValueError, 'isa got "neon", wants one of'),
    ({"out": np.zeros(3, np.float32)}, ValueError, "out: got 1 dimensions, want 4"),
    ({"out": np.zeros((1, 4, 2, 9), np.float32)}, ValueError, "out.shape got"),
    ({"out": np.zeros(SHAPE)}, TypeError, "out: got ndarray of dtype float64"),
    ({"out": np.zeros(SHAPE, np.int8)}, ValueError, "out.dtype got int8"),
    ({"out": X}, ValueError, "out: got memory that overlaps an input's"),
    ({"out": np.broadcast_to(np.float32(0), SHAPE)}, ValueError, "out: got read-only ndarray"),
    ({"out": "x"}, TypeError, "out: got str"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_attention(change, error, message):
    with pytest.raises(error, match=message) as raised:
        attn8.attention(**{"q": X, "k": X, "v": X, **change})
    assert type(raised.value) is error
    text = str(raised.value)
    assert "\n" not in text
    assert len(text) < 6000


def test_what_is_not_finite_is_found_when_asked():
    q, k, v = operands()
    attn8.attention(q, k, v, check_finite=True)
    k[1, 2, 0, 3] = np.nan
    assert np.isnan(attn8.attention(q, k, v)).any()
    with pytest.raises(ValueError, match=r"k\["):
        attn8.attention(q, k, v, check_finite=True)


def test_exceptions_of_the_package():
    assert issubclass(attn8.UnsupportedError, NotImplementedError)
    assert issubclass(attn8.UnavailableError, RuntimeError)


@pytest.mark.parametrize(
    ("starts", "error", "message"),
    [
        ([0, 5], TypeError, "cu_seqlens_q: got list"),
        (np.int64([0, 5]), TypeError, "cu_seqlens_q: got ndarray of dtype int64"),
        (np.float32([0, 5]), TypeError, "cu_seqlens_q: got ndarray of dtype float32"),
        (np.int32([[0, 5]]), ValueError, "cu_seqlens_q: got 2 dimensions, want 1"),
        (np.int32([]), ValueError, "cu_seqlens_q: got no element"),
        (np.int32([0, 4]), ValueError, "cu_seqlens_q: got 0 to 4, want 0 to 5"),
        (np.int32([1, 5]), ValueError, "cu_seqlens_q: got 1 to 5, want 0 to 5"),
        (np.int32([0, 4, 3, 5]), ValueError, "cu_seqlens_q: got 3 at 2"),
        (np.int32([-1, 5]), ValueError, "cu_seqlens_q: got -1 at 0"),
        (np.int32([0, 2, 5]), ValueError, "cu_seqlens_k: got 2 numbers, want 3"),
    ],
)
def test_starts_of_packed_sequences(starts, error, message):
    q = normal(5, 2, 8)
    with pytest.raises(error, match=message):
        attn8.attention_varlen(q, q, q, starts, np.int32([0, 5]))


def test_threads_and_environment(monkeypatch):
    assert attn8.get_num_threads() >= 1
    monkeypatch.setenv("ATTN8_THREADS", "3")
    assert attn8.get_num_threads() == 3
    monkeypatch.setenv("ATTN8_THREADS", "many")
    with pytest.raises(ValueError, match="ATTN8_THREADS: got 'many', want a number"):
        attn8.get_num_threads()
    try:
        attn8.set_num_threads(2)
        assert attn8.get_num_threads() == 2
        for threads, error in ((0, ValueError), ("2", TypeError), (True, TypeError)):
            with pytest.raises(error, match="threads: got"):
                attn8.set_num_threads(threads)
    finally:
        attn8.set_num_threads(None)
    monkeypatch.delenv("ATTN8_THREADS")
    monkeypatch.setenv("ATTN8_ISA", "z80")
    with pytest.raises(ValueError, match='isa got "z80"'):
        attn8.attention(X, X, X)


def test_info():
    info = attn8.info()
    assert info["version"] == attn8.__version__
    assert {isa["name"] for isa in info["isas"]} == {"avx512_vnni", "avx_vnni", "avx2", "scalar"}
    assert next(isa for isa in info["isas"] if isa["available"])["name"] == info["isa"]


def test_import_needs_numpy_only():
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'matplotlib', 'jax'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import attn8, numpy as np\n"
        "x = np.ones((1, 2, 1, 8), np.float32)\n"
        "assert np.allclose(attn8.attention(x, x, x), 1, atol=0.01)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


FUZZ = """
import random, sys
import numpy as np
import attn8

rng = random.Random(int(sys.argv[1]))

def array():
    rank = rng.choice([0, 1, 3, 4, 4, 4, 4, 4, 4, 5])
    shape = [rng.choice([0, 1, 1, 2, 3, 4, 8, 65, 257]) for _ in range(rank)]
    if np.prod(shape) > 1 << 16:
        shape = [min(extent, 3) for extent in shape]
    dtype = rng.choice(["f4"] * 8 + ["f2", "f2", "f8", "i1", "i4", "c8", ">f4", "O", "U2", "?"])
    x = np.zeros(shape, dtype)
    if dtype in ("f4", "f2"):
        x[...] = rng.choice([0, 1, np.nan, np.inf, 1e30, -5])
    if rank == 4 and rng.random() < 0.5:
        x = x.transpose(rng.sample(range(4), 4))
    if rank and rng.random() < 0.3:
        x = x[::rng.choice([-1, 2, -2, 3])]
    if rng.random() < 0.1:
        x = np.broadcast_to(x, x.shape)
    return x

GARBAGE = [None, True, False, 0, 1, -1, 3, 64, 128, 2**31, 2**63, -2**63, 10**30, 0.0, -1.5,
           float("nan"), float("inf"), "", "x", "accurate", "bshd", "bhsd", b"x", [], (), {},
           object(), (1, 2), (-1, 0), (0, 2**40), [3, 3], len, int, Ellipsis, 1j, "token",
           "exact", "e5m2"]
SHAPES = [(1, 3, 2, 8), (2, 5, 4, 16), (1, 130, 1, 64), (0, 2, 1, 4), (1, 0, 1, 4)]
OPTIONS = {
    "layout": ["bshd", "bhsd"], "mode": ["accurate", "paper", "half", "exact", "fp8"],
    "softmax_scale": [None, 1.0, -3, 0, 1e38], "causal": [True, False],
    "align": ["bottom_right", "top_left"],
    "window_size": [(-1, -1), (0, 0), (3, -1), (2**62, 2**62), (2**63 - 1, -1)],
    "kv_block": [0, 64, 512], "v_granularity": ["token", "tensor", "channel", "block",
    "block_channel"], "smooth_k": [True, False], "check_finite": [True, False],
    "fp8_format": ["e4m3", "e5m2"], "return_lse": [True, False], "threads": [None, 1, 2, 5],
    "isa": [None, "scalar", "avx2", "avx_vnni", "avx512_vnni"],
    "softcap": [0.0, 2.0, -1.0, float("nan"), 1e30],
    "attn_mask": [np.ones((1, 1, 1, 3), "?"), np.zeros((3, 3), "f4"), np.full((5, 5), np.nan, "f2"),
    np.ones((4, 1, 1), "?")],
    "alibi_slopes": [np.ones(2, "f4"), np.ones(4, "f4"), np.full((2, 4), np.inf, "f4")],
    "sinks": [np.ones(2, "f4"), np.full(4, np.nan, "f4"), np.ones(1, "f4")],
    "seqlens_k": [np.int32([1]), np.int32([2, 3]), np.int32([-1]), np.int32([200])],
    "leftpad_k": [np.int32([0]), np.int32([1, 1]), np.int32([-1])],
    "q_offset": [0, 5, -3, 2**48, 2**62], "k_offset": [0, 7, -(2**48), 2**63],
    "rotate": [True, False],
    "head_modes": [None, ["half"], ["accurate", "exact"], ("half",) * 4, ["paper", "fp8"], []],
}
CACHES = {
    "nheads_k": [1, 2], "head_dim": [8, 16, 5], "max_pages": [1, 4], "page_size": [0, 64, 128],
    "smooth_k": [True, False], "rotate": [True, False], "head_dim_v": [0, 0, 3, 16],
}
TAKEN = ["softmax_scale", "causal", "align", "window_size", "softcap", "alibi_slopes", "sinks",
         "return_lse", "threads", "isa", "mode", "head_modes", "attn_mask"]

def chosen(choices, names, share):
    found = {name: rng.choice(choices[name]) for name in names if rng.random() < share}
    if rng.random() < share:
        found[rng.choice(list(names))] = rng.choice(GARBAGE)
    return found

def over_a_cache():
    shape = {name: rng.choice(values) for name, values in CACHES.items()}
    cache = attn8.KVCache(**{**shape, **chosen(CACHES, CACHES, 0.05)})
    sequences = [cache.create(), cache.create()]
    heads, dim = shape["nheads_k"], shape["head_dim"]
    dim_v = shape["head_dim_v"] or dim

    def rows(heads, dim=dim):
        if rng.random() < 0.03:
            return rng.choice([array(), rng.choice(GARBAGE)])
        value = rng.choice([0, 1, -2.5, np.nan, np.inf, 3e38])
        return np.full((rng.choice([0, 1, 6, 70]), heads, dim), value, rng.choice(["f4", "f2"]))

    for sequence in sequences:
        k, v = rows(heads), rows(heads, dim_v)
        if rng.random() < 0.9:
            v = np.ones((*getattr(k, "shape", (1, heads))[:2], dim_v), "f4")
        cache.append(sequence, k, v)
    if rng.random() < 0.1:
        sequences.append(cache.fork(sequences[0], rng.choice([None, 3, *GARBAGE])))
    options = chosen(OPTIONS, TAKEN, 0.1)
    starts = rng.choice([None] * 4 + [np.int32([0, 1, 6]), np.int32([0, 70]), array()])
    if rng.random() < 0.1:
        options["out"] = rng.choice([array(), rng.choice(GARBAGE)])
    cache.attend(rng.choice([sequences, sequences[:1], sequences * 2] * 5 + [rng.choice(GARBAGE)]),
                 rows(heads * rng.choice([1, 2, 3])), starts, **options)

def with_kvcache(q, k, v):
    def lengths():
        return rng.choice([None, 0, 2, np.int32([1]), np.int32([0, 2]), array(), *GARBAGE])

    names = ["cache_seqlens", "cache_batch_idx", "cache_leftpad"]
    options = {name: lengths() for name in names if rng.random() < 0.3}
    if rng.random() < 0.2:
        options["block_table"] = rng.choice([np.int32([[0]]), np.int32([[1, 0]] * 2), array()])
    options.update(chosen(OPTIONS, TAKEN[1:2] + TAKEN[3:7], 0.3))
    options.pop("align", None)
    new = (k, v) if rng.random() < 0.4 else (None, None)
    attn8.flash_attn_with_kvcache(q, k, v, *new, **options)

ok = refused = 0
for _ in range(int(sys.argv[2])):
    if rng.random() < 0.6:
        shape = rng.choice(SHAPES)
        q, k, v = (np.full(shape, rng.choice([0, 1, -2.5, np.nan, np.inf, 3e38]), "f4")
                   for _ in "qkv")
    else:
        q, k, v = (rng.choice(GARBAGE) if rng.random() < 0.2 else array() for _ in "qkv")
    if rng.random() < 0.3:
        try:
            k = attn8.quantize(k, rng.choice(["token", "tensor", "block", 3]), block=64,
                               smooth=rng.random() < 0.5)
        except (TypeError, ValueError):
            pass
    if rng.random() < 0.1:
        fields = [k, v, q, None, "token", 0, 3]
        k = attn8.QuantizedTensor(*(rng.choice(fields) for _ in range(5)))
    options = chosen(OPTIONS, OPTIONS, rng.choice([0.02, 0.1, 0.3]))
    if rng.random() < 0.1:
        options["out"] = rng.choice([array(), q, rng.choice(GARBAGE)])
    try:
        call = rng.random()
        if call < 0.5:
            attn8.attention(q, k, v, **options)
        elif call < 0.6:
            over_a_cache()
        elif call < 0.65:
            with_kvcache(q, k, v)
        elif call < 0.7:
            attn8.rotate(rng.choice([q, array()]), threads=rng.choice([None, 1, 5, "x", 0]))
        elif call < 0.8:
            attn8.scaled_dot_product_attention(q, k, v, rng.choice([None, array()]))
        elif call < 0.9:
            starts = [rng.choice([np.int32([0, 1, 2]), np.int32([5, -9, 2]), array(), None])
                      for _ in range(2)]
            attn8.attention_varlen(q, k, v, *starts)
        elif call < 0.95:
            attn8.dequantize(rng.choice([k, attn8.QuantizedTensor(q, v)]))
        else:
            attn8.reference.emulation(q, k, v)
        ok += 1
    except (TypeError, ValueError, MemoryError, attn8.UnsupportedError) as error:
        refused += 1
        assert str(error), "an error without a text"
print(ok, refused)
"""


@pytest.mark.parametrize("seed", range(4))
def test_no_argument_crashes_the_interpreter(seed):
    environment = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONWARNINGS": "ignore"}
    run = subprocess.run(
        [sys.executable, "-c", FUZZ, str(seed), "1500"],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    ok, refused = map(int, run.stdout.split())
    assert ok > 100
    assert refused > 300
