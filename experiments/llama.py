"""llama.cpp beside ours: a model of Llama's shape and random weights, made on the spot.

Needs `pip install xllamacpp gguf`. Random weights are as fast as trained ones, and write nonsense.
"""

import os
from contextlib import suppress
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

HEAD, FEED, CONTEXT = 64, 2.75, 4096  # width of a head, of the feed-forward part in widths, tokens
BLOCK = {"Q8_0": 32, "Q4_0": 16}  # bytes of 32 weights, behind the 2 of their scale


def tensors(width, vocab, layers):
    """{name: (rows, columns)}; one number is the length of a vector."""
    feed = int(FEED * width)
    yield "token_embd.weight", (vocab, width)
    yield "output_norm.weight", (width,)
    for i in range(layers):
        yield from ((f"blk.{i}.{name}_norm.weight", (width,)) for name in ("attn", "ffn"))
        for name in ("q", "k", "v", "output"):
            yield f"blk.{i}.attn_{name}.weight", (width, width)
        yield from ((f"blk.{i}.ffn_{name}.weight", (feed, width)) for name in ("gate", "up"))
        yield f"blk.{i}.ffn_down.weight", (width, feed)


def size_of(shapes):
    return sum(int(np.prod(shape)) for _, shape in shapes)


def write(path, kind, width, vocab, layers):
    """A GGUF file of random weights; its tokens are <0x00> to <0xFF> and numbers."""
    import gguf

    out, draw = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    out.add_block_count(layers)
    out.add_context_length(CONTEXT)
    out.add_embedding_length(width)
    out.add_feed_forward_length(int(FEED * width))
    out.add_head_count(width // HEAD)
    out.add_head_count_kv(width // HEAD)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(HEAD)
    out.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    out.add_tokenizer_model("llama")
    first = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    out.add_token_list(first + [f"t{i}" for i in range(len(first), vocab)])
    out.add_token_scores([-float(i) for i in range(vocab)])
    out.add_token_types([2, 3, 3] + [6] * 256 + [1] * (vocab - len(first)))
    for name, shape in tensors(width, vocab, layers):
        if len(shape) == 1:
            out.add_tensor(name, np.ones(shape, np.float32))
            continue
        rows = draw.integers(0, 256, (np.prod(shape) // 32, 2 + BLOCK[kind]), np.uint8)
        scale = np.float16(0.02 / (4.6 if kind == "Q4_0" else 73.9))  # even over 16 or 256 steps
        rows[:, :2] = np.frombuffer(scale.tobytes(), np.uint8)
        rows = rows.reshape(shape[0], -1)
        out.add_tensor(name, rows, raw_dtype=gguf.GGMLQuantizationType[kind])
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


class Llama:
    """A llama.cpp model with about the given number of parameters; `model(tokens)` generates that
    many tokens. It has a process of its own: where two libraries have threads in one, OpenMP
    counts more threads than cores, lets none wait awake, and both become up to eight times slower.

    Raises ImportError if a package is missing, ValueError if the sizes do not suit llama.cpp.
    """

    def __init__(self, kind, parameters, width, vocab, threads):
        for package in ("gguf", "xllamacpp"):
            import_module(package)

        if width % 128 or vocab < 259:  # so that all rows fall into blocks of 32 weights
            raise ValueError("width must be a multiple of 128, vocabulary at least 259 tokens")
        one = size_of(tensors(width, vocab, 1)) - size_of(tensors(width, vocab, 0))
        layers = max(1, round((parameters - size_of(tensors(width, vocab, 0))) / one))
        self.parameters = size_of(tensors(width, vocab, layers))
        self.folder = TemporaryDirectory()
        path = str(Path(self.folder.name, "model.gguf"))
        write(path, kind, width, vocab, layers)
        self.bytes = os.path.getsize(path)
        spawn = get_context("spawn")
        self.pipe, other = spawn.Pipe()
        spawn.Process(target=serve, args=(path, threads, other), daemon=True).start()
        other.close()  # so that recv fails, and does not wait, when the process has died
        try:
            self(1)  # returns when the model is loaded
        except (EOFError, ConnectionError):
            raise ValueError("its process ended while it loaded the model") from None

    def __call__(self, tokens):
        self.pipe.send(tokens)
        n = self.pipe.recv()
        assert n == tokens, f"llama.cpp wrote {n} tokens in place of {tokens}"
        return n


def serve(path, threads, pipe):
    """Write as many tokens as the pipe asks for, and answer with their number, until it closes."""
    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.verbosity, p.warmup = path, CONTEXT, 1, -1, True
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    server, asked = xllamacpp.Server(p), {"prompt": [1], "temperature": 0.0, "ignore_eos": True}
    with suppress(EOFError):
        while tokens := pipe.recv():
            said = server.handle_completions(asked | {"max_tokens": tokens})
            pipe.send(said["usage"]["completion_tokens"])
