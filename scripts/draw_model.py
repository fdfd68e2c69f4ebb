"""Draw docs/model.svg, the network of the default size, and docs/stages.svg, from text to chat.

    python scripts/draw_model.py

Shapes come from LMConfig, numbers of parameters from the modules that it describes.
"""

from html import escape

import torch
from torch import nn

from common import ROOT, make_parser
from model import LMConfig, MiniMindLM

PICTURE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" \
height="{height}" role="img" font-size="13" text-anchor="middle" \
font-family="system-ui, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', Arial, sans-serif">
<title>{title}</title>
<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" \
orient="auto"><path d="M0 0L8 4L0 8z" fill="{line}"/></marker></defs>
<rect width="{width}" height="{height}" rx="12" fill="#ffffff"/>
{body}
</svg>
"""
# Fill and border by what a box stands for. The ground is white, for pages in dark mode too.
DATA, STEP, WEIGHTS, USE, FRAME = (
    ("#fef3c7", "#d97706"),
    ("#dbeafe", "#2563eb"),
    ("#f1f5f9", "#64748b"),
    ("#dcfce7", "#16a34a"),
    ("#ffffff", "#94a3b8"),
)
INK, LINE = "#0f172a", "#475569"
LEADING = 17


def words(x: float, y: float, text: str, more: str = 'font-size="12"') -> str:
    """A line of text, centred at x unless the attributes in `more` say otherwise."""
    return f'<text x="{x:g}" y="{y:g}" fill="{INK}" {more}>{escape(text)}</text>'


def box(x: float, y: float, width: float, height: float, look: tuple[str, str], *lines: str) -> str:
    """A box with centred lines of text, the first of them bold."""
    fill, border = look
    first = y + height / 2 - LEADING * (len(lines) - 1) / 2 + 4.5
    rect = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
    parts = [f'{rect}fill="{fill}" stroke="{border}"/>']
    for i, line in enumerate(lines):
        more = 'font-size="12"' if i else 'font-weight="600"'
        parts.append(words(x + width / 2, first + LEADING * i, line, more))
    return "\n".join(parts)


def arrow(*points: tuple[float, float], end: str = ' marker-end="url(#head)"') -> str:
    """A line through points that ends in an arrow's head, or in nothing."""
    path = "L".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path d="M{path}" fill="none" stroke="{LINE}" stroke-width="1.4"{end}/>'


def plus(x: float, y: float) -> str:
    """The circle in which a branch is added to the residual stream."""
    circle = f'<circle cx="{x:g}" cy="{y:g}" r="10" fill="#ffffff" stroke="{LINE}"/>'
    strokes = (arrow((x - 5, y), (x + 5, y), end=""), arrow((x, y - 5), (x, y + 5), end=""))
    return "\n".join((circle, *strokes))


def picture(width: int, height: int, title: str, *parts: str) -> str:
    """The text of an SVG file."""
    body = "\n".join(parts)
    return PICTURE.format(width=width, height=height, title=title, line=LINE, body=body)


def size(module: nn.Module) -> str:
    """The number of parameters of a module, as the documentation writes it."""
    count = sum(p.numel() for p in module.parameters())
    return f"{count / 1e6:.2f} M" if count >= 1e6 else f"{count:,}"


def draw_model(config: LMConfig) -> str:
    """Draw a dense network in the order in which a token meets it, and one of its blocks."""
    with torch.device("meta"):  # shapes without numbers
        model = MiniMindLM(config)
    block = model.layers[0]
    dim, vocab = config.dim, f"{config.vocab_size:,}"

    def matrix(x: float, y: float, width: float, name: str, linear: nn.Linear) -> str:
        shape = f"{linear.in_features:,} × {linear.out_features:,}: {size(linear)}"
        return box(x, y, width, 44, STEP, name, shape)

    x, width = 24, 270
    middle = x + width / 2
    network = (
        words(middle, 38, f"MiniMindLM: {size(model)} parameters", 'font-weight="600"'),
        box(x, 54, width, 34, DATA, "token ids (T)"),
        arrow((middle, 88), (middle, 112)),
        box(x, 113, width, 50, STEP, "embedding", f"{vocab} × {dim}: {size(model.tok_embeddings)}"),
        arrow((middle, 163), (middle, 195)),
        words(middle + 10, 183, f"(T, {dim})", 'font-size="12" text-anchor="start"'),
        *(box(x + shift, 196 + shift, width - 16, 76, STEP) for shift in (16, 8)),
        box(x, 196, width - 16, 76, STEP, f"{config.n_layers} blocks", f"{size(block)} each"),
        arrow((middle, 288), (middle, 320)),
        words(middle + 10, 308, f"(T, {dim})", 'font-size="12" text-anchor="start"'),
        box(x, 321, width, 34, STEP, f"RMSNorm: {size(model.norm)}"),
        arrow((middle, 355), (middle, 379)),
        box(x, 380, width, 50, STEP, "output", f"{dim} × {vocab}: the embedding's matrix"),
        arrow((middle, 430), (middle, 454)),
        box(
            x,
            455,
            width,
            50,
            USE,
            f"logits (T, {vocab})",
            "softmax: the next token's probabilities",
        ),
    )

    # The residual stream runs down at x = stream; branches leave it to the right and come back.
    frame, stream, x, width = 334, 366, 400, 512
    middle, half, third = x + width / 2, (width - 10) / 2, (width - 20) / 3
    heads = f"{config.n_heads} query heads, {config.n_kv_heads} key and value heads"
    zoom = f'fill="none" stroke="{FRAME[1]}" stroke-dasharray="4 4"'
    attention, feed_forward = block.attention, block.feed_forward
    inside = [
        f'<path d="M294 212L{frame} 16M294 288L{frame} 530" {zoom}/>',
        box(frame, 16, 596, 514, FRAME),
        words(
            x,
            38,
            f"a block: x + attention, then x + feed-forward, each (T, {dim})",
            'font-weight="600" text-anchor="start"',
        ),
        arrow((stream, 30), (stream, 243)),
        arrow((stream, 68), (x - 1, 68)),
        box(x, 54, width, 28, STEP, f"RMSNorm: {size(block.attention_norm)}"),
        box(
            x,
            164,
            width,
            46,
            WEIGHTS,
            f"attention: {heads} of {config.head_dim}",
            "rotary embedding of queries and keys, causal softmax, sum of values",
        ),
        arrow((middle, 210), (middle, 230)),
        matrix(x, 231, width, "wo", attention.wo),
        arrow((x, 253), (stream + 10, 253)),
        plus(stream, 253),
        arrow((stream, 263), (stream, 461)),
        arrow((stream, 308), (x - 1, 308)),
        box(x, 294, width, 28, STEP, f"RMSNorm: {size(block.ffn_norm)}"),
        box(x, 404, width, 28, WEIGHTS, "SwiGLU: silu(w1 x) · w3 x"),
        arrow((middle, 432), (middle, 448)),
        matrix(x, 449, width, "w2", feed_forward.w2),
        arrow((x, 471), (stream + 10, 471)),
        plus(stream, 471),
        arrow((stream, 481), (stream, 520)),
    ]
    for i, name in enumerate(("wq", "wk", "wv")):
        left = x + i * (third + 10)
        inside += [arrow((left + third / 2, y), (left + third / 2, y + 19)) for y in (82, 144)]
        inside.append(matrix(left, 101, third, name, getattr(attention, name)))
    for i, name in enumerate(("w1", "w3")):
        left = x + i * (half + 10)
        inside += [arrow((left + half / 2, y), (left + half / 2, y + 18)) for y in (322, 385)]
        inside.append(matrix(left, 341, half, name, getattr(feed_forward, name)))
    return picture(946, 546, "The network and one of its blocks", *network, *inside)


def draw_stages() -> str:
    """Draw the way from text to chat: data, tokens, the stages with their files, what uses them."""
    stages = (
        (("plain text", '{"text"}'),
         ("Pretraining", "train_pretrain.py", "learns to continue text", "from random weights"),
         "pretrain_512.pth"),
        (("conversations", '{"conversations"}'),
         ("Instruction tuning", "train_full_sft.py", "learns to answer", "from pretrain"),
         "full_sft_512.pth"),
        (("pairs of replies", '{"chosen", "rejected"}'),
         ("Preference tuning", "train_dpo.py", "prefers the better reply", "from full_sft"),
         "dpo_512.pth"),
        (("conversations", '{"conversations"}'),
         ("Adapter (LoRA)", "train_lora.py", "learns one more skill", "from full_sft"),
         "lora/identity_512.pth"),
        (("conversations", '{"conversations"}'),
         ("Distillation", "train_distillation.py", "imitates a larger model", "from pretrain"),
         "distill_512.pth"),
    )  # fmt: skip
    uses = (
        ("terminal", "eval_model.py"),
        ("OpenAI's API", "scripts/serve_openai_api.py"),
        ("web page", "scripts/web_demo.py"),
        ("other engines", "scripts/convert_model.py"),
    )
    start, width, gap, whole = 24, 168, 22, 928
    parts = [
        box(start - 8, 272, whole + 16, 48, FRAME),
        box(start, 96, whole, 34, STEP, "tokenizer: text → token ids → batches"),
    ]
    for i, (data, stage, file) in enumerate(stages):
        x = start + i * (width + gap)
        middle = x + width / 2
        parts += [
            box(x, 24, width, 46, DATA, *data),
            arrow((middle, 70), (middle, 95)),
            arrow((middle, 130), (middle, 155)),
            box(x, 156, width, 88, STEP, *stage),
            arrow((middle, 244), (middle, 281)),
            box(x, 282, width, 28, WEIGHTS, file),
        ]
        if i < 2:  # the next stage starts from this one's weights
            right, bend = x + width, x + width + gap / 2
            parts.append(arrow((right, 296), (bend, 296), (bend, 200), (right + gap - 1, 200)))
    each = (whole - gap * 3) / 4
    for i, use in enumerate(uses):
        x = start + i * (each + gap)
        parts += [
            arrow((x + each / 2, 320), (x + each / 2, 345)),
            box(x, 346, each, 46, USE, *use),
        ]
    return picture(start * 2 + whole, 416, "From text to chat", *parts)


def main() -> None:
    """Write both pictures."""
    make_parser(__doc__.splitlines()[0]).parse_args()
    for name, drawn in (("model", draw_model(LMConfig())), ("stages", draw_stages())):
        path = ROOT / "docs" / f"{name}.svg"
        path.write_text(drawn, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
