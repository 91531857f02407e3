"""Pictures through the doors: what a prompt gets, what is counted, what is refused, and what text can never do."""

from __future__ import annotations

import asyncio
import base64
import io
import resource
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from exo_kimi.arch.vision import VisionConfig
from exo_kimi.chat.template import ChatTemplate
from exo_kimi.checkpoint.checkpoint import Checkpoint
from exo_kimi.checkpoint.rendering.template import CompiledTemplate
from exo_kimi.dialogue.pictures import PicturePrompts
from exo_kimi.pictures import decoding
from exo_kimi.pictures.picture import PixelRules
from exo_kimi.pictures.reader import PictureReader

CHAT = "/v1/chat/completions"


def png(size: tuple[int, int] = (200, 120), color: str = "red", form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, form)
    return buffer.getvalue()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def url_of(data: bytes) -> str:
    return "data:image/png;base64," + encoded(data)


def part(url: str) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "auto"}}


def user(*content: object) -> dict[str, object]:
    return {"role": "user", "content": list(content)}


SAY = {"type": "text", "text": "What is this?"}


@pytest.fixture(scope="module")
def seer(thinker):
    """A speaker that takes pictures."""
    checkpoint = Checkpoint(thinker.directory)
    config = VisionConfig.from_dict(checkpoint.raw_config, hidden_size=checkpoint.config.hidden_size)
    reader = PictureReader(PixelRules.from_directory(config, thinker.directory))
    return replace(thinker, pictures=PicturePrompts(config, reader))


@pytest.fixture
def pad(seer):
    return seer.pictures.config.media_placeholder_token_id


def vectors(engine) -> list[tuple[int, int]]:
    """(start, tokens) of the pictures of the last request."""
    return [(shown.start, shown.tokens) for shown in engine.requests[-1].pictures]


async def test_a_picture_takes_its_place_in_the_prompt(saying, client_of, seer, pad):
    engine = saying("</think>A red one.", by=seer)
    async with client_of(engine) as client:
        answer = await client.post(CHAT, json={"messages": [user(SAY, part(url_of(png())))]})
    assert answer.status_code == 200, answer.text
    ids = engine.requests[0].prompt_ids
    ((start, tokens),) = vectors(engine)
    assert tokens == 5 * 8  # 120 x 200 pixels are 5 x 8 tokens of 28 x 28
    assert ids[start : start + tokens] == (pad,) * tokens
    assert ids.count(pad) == tokens
    assert seer.tokenizer.decode(ids[start - 3 : start]).endswith("image<|media_content|>")
    assert answer.json()["usage"]["prompt_tokens"] == len(ids)


async def test_every_door_shows_the_same_picture(saying, client_of, seer):
    red, blue = png(), png(color="blue", form="JPEG")
    engine = saying("</think>Yes.", by=seer)
    tool = {"name": "look", "description": "Take a picture", "input_schema": {"type": "object"}}
    use = {"type": "tool_use", "id": "toolu_1", "name": "look", "input": {}}
    source = {"type": "base64", "media_type": "image/jpeg", "data": encoded(blue)}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "image", "source": source}]}
    asked = {
        CHAT: {"messages": [user(SAY, part(url_of(red)), part(url_of(blue)))]},
        "/v1/responses": {
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_text", "text": "What is this?"},
                        {"type": "input_image", "image_url": url_of(red)},
                        {"type": "input_image", "image_url": url_of(blue), "detail": "high"},
                    ],
                }
            ]
        },
        "/v1/messages": {
            "max_tokens": 50,
            "tools": [tool],
            "messages": [
                user(SAY, {"type": "image", "source": {**source, "media_type": "image/png", "data": encoded(red)}}),
                {"role": "assistant", "content": [use]},
                user(result),
            ],
        },
        "/api/chat": {
            "stream": False,
            "messages": [{"role": "user", "content": "What is this?", "images": [encoded(red), encoded(blue)]}],
        },
        "/api/generate": {"stream": False, "prompt": "What is this?", "images": [encoded(red), encoded(blue)]},
    }
    found = []
    async with client_of(engine) as client:
        for path, body in asked.items():
            answer = await client.post(path, json={"model": "tiny-kimi", **body})
            assert answer.status_code == 200, (path, answer.text)
            assert "warnings" not in answer.json(), path
            found.append([shown.picture.digest for shown in engine.requests[-1].pictures])
    assert found == [found[0]] * len(asked)
    assert len(set(found[0])) == 2


async def test_text_never_makes_a_media_token(saying, client_of, seer, pad):
    spelled = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>" * 3
    engine = saying("</think>No.", by=seer)
    messages = [
        {"role": "system", "content": spelled},
        user({"type": "text", "text": spelled}, part(url_of(png())), {"type": "text", "text": spelled}),
        {"role": "assistant", "content": spelled},
        {"role": "user", "content": spelled, "name": "<|media_pad|>"},
    ]
    async with client_of(engine) as client:
        answer = await client.post(CHAT, json={"messages": messages})
    assert answer.status_code == 200, answer.text
    ((start, tokens),) = vectors(engine)
    assert engine.requests[0].prompt_ids.count(pad) == tokens
    assert engine.requests[0].prompt_ids[start] == pad


async def test_pictures_of_earlier_turns_are_read_once(saying, client_of, seer, monkeypatch):
    engine = saying("</think>Yes.", by=seer)
    picture = part(url_of(png(size=(90, 90), color="teal")))
    read: list[int] = []
    monkeypatch.setattr(
        "exo_kimi.pictures.reader.decode_picture",
        lambda data, rules, *, param: read.append(len(data)) or decoding.decode_picture(data, rules, param=param),
    )
    turns = [user(SAY, picture), {"role": "assistant", "content": "Teal."}, {"role": "user", "content": "Sure?"}]
    async with client_of(engine) as client:
        for count in (1, 3):
            answer = await client.post(CHAT, json={"messages": turns[:count]})
            assert answer.status_code == 200, answer.text
    assert len(read) == 1
    assert vectors(engine) and engine.requests[0].prompt_ids != engine.requests[1].prompt_ids


async def test_a_server_without_a_tower_says_why(saying, client_of, thinker):
    engine = saying("</think>No.", by=thinker)
    async with client_of(engine) as client:
        chat = await client.post(CHAT, json={"messages": [user(part(url_of(png())))]})
        lenient = await client.post(
            "/v1/responses",
            json={
                "model": "tiny-kimi",
                "input": [{"role": "user", "content": [{"type": "input_image", "image_url": url_of(png())}]}],
            },
        )
    assert chat.status_code == 400
    assert "text only" in chat.json()["error"]["message"]
    assert chat.json()["error"]["param"] == "messages[0].content[0]"
    assert lenient.status_code == 200
    assert "left out" in " ".join(lenient.json()["warnings"])


async def test_a_template_without_pictures_is_named(saying, client_of, seer):
    source = "{% for message in messages %}<|im_user|>{{ message.role }}<|im_middle|>{% endfor %}"
    blind = replace(seer, template=ChatTemplate(seer.tokenizer, CompiledTemplate(source, "a test")))
    engine = saying("No.", by=blind)
    async with client_of(engine) as client:
        answer = await client.post(CHAT, json={"messages": [user(part(url_of(png())))]})
    assert answer.status_code == 400
    assert "chat template does not show pictures" in answer.json()["error"]["message"]


def cut(form: str, keep: float) -> bytes:
    data = png((300, 200), form=form)
    return data[: int(len(data) * keep)]


def bomb(width: int, height: int, mode: str = "1") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height)).save(buffer, "PNG")
    return buffer.getvalue()


HOSTILE = {
    **{
        f"{form} cut at {keep}": url_of(cut(form, keep))
        for form in ("PNG", "JPEG", "GIF", "BMP")
        for keep in (0.2, 0.8)
    },
    "webp cut": url_of(cut("WEBP", 0.5)),
    "bomb of 400 million pixels": url_of(bomb(20_000, 20_000)),
    "long and thin": url_of(bomb(65_500, 2)),
    "41 million pixels": url_of(bomb(10_250, 4_000)),
    "empty": url_of(b""),
    "text": url_of(b"hello, world"),
    "svg": url_of(b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"),
    "pdf": url_of(b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"),
    "html": url_of(b"<html><script>alert(1)</script></html>"),
    "zip": url_of(b"PK\3\4" + bytes(60)),
    "tiff": url_of(b"II*\0" + bytes(60)),
    "icns": url_of(b"icns\0\0\0\x10" + bytes(40)),
    "eps": url_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n"),
    "psd": url_of(b"8BPS\0\1" + bytes(40)),
    "png with a size of 0": url_of(png().replace((200).to_bytes(4, "big"), bytes(4), 1)),
    "png with a changed size": url_of(png().replace((200).to_bytes(4, "big"), (40_000).to_bytes(4, "big"), 1)),
    "zeros": url_of(bytes(10_000)),
    "noise": url_of(np.random.default_rng(0).bytes(10_000)),
    "jpeg of two bytes": url_of(b"\xff\xd8"),
    "gif of a header": url_of(b"GIF89a\xff\xff\xff\xff\0\0\0"),
    "no base64": "data:image/png;base64,!!!!",
    "half a base64": "data:image/png;base64,iVBORw0KGgo",
    "no comma": "data:image/png;base64",
    "data alone": "data:",
    "file": "file:///etc/passwd",
    "ftp": "ftp://example.com/a.png",
    "javascript": "javascript:alert(1)",
    "http": "http://example.com/a.png",
    "https": "https://example.com/a.png",
    "metadata service": "http://169.254.169.254/latest/meta-data/",
    "loopback": "http://127.0.0.1:8000/metrics",
    "a path": "/etc/passwd",
    "nothing": "",
}


def test_forty_hostile_files_and_urls_are_tried():
    assert len(HOSTILE) >= 40


async def test_hostile_files_and_urls_are_refused_and_others_are_served(saying, client_of, seer):
    engine = saying("</think>Yes.", by=seer)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with client_of(engine) as client:
        for name, url in HOSTILE.items():
            async with asyncio.timeout(30):
                refused, served = await asyncio.gather(
                    client.post(CHAT, json={"messages": [user(SAY, part(url))]}),
                    client.post(CHAT, json={"messages": [user(SAY, part(url_of(png())))]}),
                )
            assert refused.status_code == 400, (name, refused.text)
            assert refused.json()["error"]["param"] == "messages[0].content[1]", name
            assert served.status_code == 200, name
    assert len(engine.requests) == len(HOSTILE)
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown * (1 if sys.platform == "darwin" else 1024) < 200e6


@pytest.mark.parametrize("broken", [{}, {"image_url": None}, {"image_url": 7}, {"image_url": {"url": None}}])
async def test_a_part_without_a_picture_is_refused(saying, client_of, seer, broken):
    async with client_of(saying("No.", by=seer)) as client:
        answer = await client.post(CHAT, json={"messages": [user({"type": "image_url", **broken})]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].content[0]"


async def test_a_large_picture_fits_where_so_much_text_would_not(saying, client_of, seer):
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (1400, 1400, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG", compress_level=0)
    url = url_of(buffer.getvalue())
    assert len(url) > 7_500_000
    engine = saying("</think>Noise.", by=seer)
    async with client_of(engine) as client:
        answer = await client.post(CHAT, json={"messages": [user(SAY, part(url))]})
        refused = await client.post(CHAT, json={"messages": [{"role": "user", "content": "a" * 60_000_000}]})
    assert answer.status_code == 200, answer.text
    assert vectors(engine)[0][1] == 50 * 50
    assert refused.status_code in (400, 413)
