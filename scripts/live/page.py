"""The page: a prompt, base and erased side by side, strength by slider. Nothing in it is fetched
from elsewhere, and nothing is reported to anybody."""

from __future__ import annotations

import base64
import html
import os
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from PIL.Image import Image

from erase.eval.generate import GenerateConfig
from erase.eval.report.covering import is_covered
from erase.prompts.errors import ErasureError
from erase.scripts.live.stage import Layers, Pair, Stage, Wish, seeds_of

TEMPLATES = Path(__file__).parent / "templates"
SMALL = 128  # px; smaller pictures are drawn at whole multiples
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
_jinja = Environment(
    loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


def gradio() -> Any:
    """The library, with its telemetry off before it is imported.

    Raises:
        ErasureError: it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise ErasureError(
            "the live page needs gradio, which is not installed; "
            "pip install 'concept-erasure-toolkit[live]'"
        ) from error
    return gradio


def make_page(stage: Stage, prompt: str, config: GenerateConfig) -> Any:
    """The page of a stage, not yet served.

    Args:
        stage: draws.
        prompt: what stands in the prompt's field at first.
        config: steps and guidance at first.
    """
    gr, names = gradio(), list(stage.erasures)
    with gr.Blocks(title="Base and erased", analytics_enabled=False) as page:
        gr.HTML(
            f'<h1>Base and erased</h1><p class="lead">{html.escape(stage.model.name)} beside what '
            "an erasure makes of it, from the same prompt and seed.</p>"
        )
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                text = gr.Textbox(prompt, label="Prompt", lines=2, max_lines=4, elem_id="prompt")
                chosen = gr.Dropdown(
                    names, value=names[:1], multiselect=True, label="Erasures (changes are added)",
                    elem_id="erasures",
                )  # fmt: skip
                strength = gr.Slider(
                    -1, 2, 1.0, step=0.05, label="Strength: 0 is the base", elem_id="strength"
                )
                seeds = gr.Textbox("0-1", label="Seeds", elem_id="seeds")
                with gr.Accordion("Sampling", open=False):
                    steps = gr.Slider(1, 100, config.steps, step=1, label="Steps")
                    guidance = gr.Slider(0, 20, config.guidance, step=0.5, label="Guidance scale")
                blurred = gr.Checkbox(
                    is_covered(None, stage.model.name), label="Blur pictures until pointed at",
                    elem_id="blurred",
                )  # fmt: skip
                button = gr.Button("Draw", variant="primary", elem_id="draw")
            with gr.Column(scale=3, min_width=280):
                pictures = gr.HTML(elem_id="pictures")
                note = gr.HTML(elem_id="note", elem_classes="note")
                with gr.Accordion("Where it changes the network", open=False):
                    layers = gr.HTML(layers_html(stage, names[:1]), elem_id="layers")

        def draw(*given: Any) -> tuple[Any, str]:
            shown, said = answer(stage, *given)
            return gr.skip() if shown is None else shown, said

        wish = [text, chosen, strength, seeds, steps, guidance, blurred]
        gr.on(
            [button.click, text.submit, seeds.submit, strength.release, chosen.input,
             blurred.input],
            draw, wish, [pictures, note], api_visibility="private", trigger_mode="always_last",
        )  # fmt: skip
        chosen.input(
            lambda chosen: layers_html(stage, chosen), chosen, layers, api_visibility="private"
        )
    return page


def answer(
    stage: Stage,
    prompt: str,
    erasures: Sequence[str],
    strength: float,
    seeds: str,
    steps: float,
    guidance: float,
    blurred: bool = False,
) -> tuple[str | None, str]:
    """What the page shows for what was typed: the pictures, or None to leave those that are there,
    and a line below them."""
    began = time.monotonic()
    try:
        wish = Wish(
            prompt, seeds_of(seeds), tuple(erasures), float(strength), int(steps), float(guidance)
        )
        pairs = stage.pairs(wish)
    except ErasureError as error:
        return None, f'<p class="error" role="alert">{html.escape(_sentence(str(error)))}</p>'
    seconds = time.monotonic() - began
    took = f"in {seconds:.1f} s" if seconds > 0.05 else "that were drawn before"
    notes = [*stage.notes(prompt), f"{2 * len(pairs)} pictures {took}."]
    title = f"Without {', '.join(stage.erasures[name].delta.title for name in erasures)}"
    if strength != 1:
        title += f", strength {strength:g}"
    said = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return pairs_html(pairs, prompt, title, blurred), said


def pairs_html(pairs: Sequence[Pair], prompt: str, title: str, blurred: bool) -> str:
    """The pictures, base and erased side by side, for each seed."""
    return _jinja.get_template("pairs.html.j2").render(
        pairs=pairs,
        prompt=prompt,
        title=title,
        blurred=blurred,
        side=max(pairs[0].before.image.size),
        small=SMALL,
        source=_source,
    )


def layers_html(stage: Stage, names: Sequence[str]) -> str:
    """A table with bars, for each erasure: its share of every block's weights."""
    return _jinja.get_template("layers.html.j2").render(
        layers=[_bars(stage.layers(name)) for name in names]
    )


def _bars(layers: Layers) -> dict[str, Any]:
    shares = [block.density for block in layers.changed] + list(layers.allowed.values())
    return {**vars(layers), "most": max(shares, default=0.0) or 1.0}


def _source(image: Image) -> str:
    """A picture as a `data:` address: small ones exactly."""
    content = BytesIO()
    image.save(content, "WEBP", lossless=max(image.size) <= SMALL, quality=92)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."


def serve(page: Any, host: str, port: int | None) -> str:
    """Serve a page from a thread of its own, and return its address.

    Raises:
        ErasureError: the port is taken, or no such host is this machine's.
    """
    gr = gradio()
    try:
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            show_error=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
            css_paths=[TEMPLATES / "page.css"],
            theme=gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"]),
        )
    except OSError as error:
        raise ErasureError(
            f"cannot serve at {host}, port {port or 'any of 7860 to 7959'}: "
            f"{' '.join(str(error).split())}; choose another --port or --host"
        ) from error
    return str(address)
