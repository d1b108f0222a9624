"""Section 5: what one side says, the other understands, and nothing else gets through."""

from __future__ import annotations

import json
import random
import struct
import zlib
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from tests import seam as est
from tests.seam import MISSING, fields, replace

quick = settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
RUN = "20261122-210501-7f3a"
JOB = est.JobRecord(RUN, "127.0.0.2", "ab" * 16, est.Kind.DEPLOY, "master")
BAD_RUNS: list[Any] = [
    "../x", "..", "", ".", "/etc/passwd", f"../{RUN}", f"{RUN}/..", f"{RUN}/x", f"{RUN}\\x", f"{RUN}\n", f"{RUN}\0",
    "C:x", RUN.upper(), "２０261122-210501-7f3a", None, 5, True, [RUN], {"run": RUN},
]  # fmt: skip

NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def values_of(annotation: str) -> st.SearchStrategy[Any]:
    """Every value that a field of this annotation may have."""
    if annotation.endswith(" | None"):
        return st.none() | values_of(annotation.removesuffix(" | None"))
    if annotation.startswith("list["):
        return st.lists(values_of(annotation[5:-1]), max_size=3)
    if annotation.startswith("dict[str, "):
        return st.dictionaries(st.text(), values_of(annotation[10:-1]), max_size=3)
    if annotation in est.WORDS:
        return st.sampled_from(est.WORDS[annotation])
    simple: dict[str, st.SearchStrategy[Any]] = {
        "str": st.text(), "bool": st.booleans(), "int": st.integers(1 - 2**63, 2**63 - 1), "Any": JSON,
        "float": st.floats(-(2.0**53) + 1, 2.0**53 - 1),
    }  # fmt: skip
    return simple[annotation]


def messages() -> st.SearchStrategy[Any]:
    def build(cls: Any) -> st.SearchStrategy[Any]:
        values = {spec.name: values_of(str(spec.type)) for spec in fields(cls)}
        return st.builds(cls, **(values | {"run": st.just(RUN)} if "run" in values else values))

    return st.one_of([build(cls) for cls in est.MESSAGES])


def example_of(cls: Any) -> dict[str, Any]:
    """A message's JSON, with every field, as simple as it can be."""
    simple: dict[str, Any] = {"str": "", "int": 1, "float": 1.5, "bool": True, "State": "running", "Kind": "deploy"}
    data: dict[str, Any] = {"verb": est.VERB_OF[cls]}
    for spec in fields(cls):
        kind = str(spec.type)
        data[spec.name] = simple.get(kind, None if "None" in kind else [] if kind.startswith("list") else {})
    return data | {"run": RUN} if "run" in data else data


@quick
@given(messages())
def test_every_message_arrives_as_it_was_sent(message: Any) -> None:
    text = est.encode_message(message)
    assert "\n" not in text
    arrived = est.decode_message(text.encode().decode())
    assert type(arrived) is type(message)
    for name, value in vars(message).items():  # but that every text is one printable line
        assert getattr(arrived, name) == est._clean(type(message), name, value)
    again = est.decode_message(est.encode_message(arrived))
    assert again == arrived
    for name, value in vars(message).items():  # State is a str: equal is not enough
        assert not isinstance(value, (est.State, est.Kind)) or type(getattr(arrived, name)) is type(value)


def test_a_message_is_one_line_of_json_with_its_verb() -> None:
    assert len(est.VERBS) == len(est.MESSAGES) and {"hello", "run", "job"} <= set(est.VERBS)
    assert est.encode_message(est.Cancel(RUN)) == '{"verb":"cancel","run":"' + RUN + '","by":""}'


@pytest.mark.parametrize("cls", est.MESSAGES)
def test_what_a_newer_program_adds_is_ignored_and_what_an_older_one_lacks_has_its_default(cls: Any) -> None:
    full = example_of(cls)
    message = est.decode_message(json.dumps(full | {"why": [1], "Run": 0}))
    for spec in fields(cls):
        text = json.dumps({key: value for key, value in full.items() if key != spec.name})
        factory = spec.default_factory
        if spec.default is MISSING and factory is MISSING:
            with pytest.raises(est.ProtocolError, match=f"^{cls.__name__}: {spec.name} is missing$"):
                est.decode_message(text)
        else:
            default = spec.default if factory is MISSING else factory()
            assert est.decode_message(text) == replace(message, **{spec.name: default})


@pytest.mark.parametrize("bad", BAD_RUNS)
def test_a_run_that_could_be_a_path_is_refused(bad: Any) -> None:
    carriers = [cls for cls in est.MESSAGES if "run" in example_of(cls)]
    assert len(carriers) >= 8
    for cls in carriers:
        assert est.decode_message(json.dumps(example_of(cls))).run == RUN
        with pytest.raises(est.ProtocolError, match="run can't be"):
            est.decode_message(json.dumps(example_of(cls) | {"run": bad}))
    order = est.decode_message(est.encode_message(est.Order(vars(JOB) | {"run": bad})))
    with pytest.raises(est.ProtocolError, match="run can't be"):  # whoever takes an order decodes what it carries
        est.decode_fields(est.JobRecord, order.job)


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        ("state", "gone"), ("state", 1), ("state", None), ("kind", "shell"), ("host", None), ("host", 5),
        ("host", "\udcff"), ("error", "\ud800"), ("revision", True), ("revision", 1.0), ("revision", "1"),
        ("revision", 1 << 63), ("revision", None), ("exit", "0"), ("exit", False), ("size", -(1 << 63)),
        ("started", "now"), ("started", True), ("created", 1 << 53), ("created", None), ("created", float("nan")),
        ("created", float("inf")), ("created", 1e300), ("ordered", 1), ("open_step", 1), ("steps", "2"),
        ("marks", [1]), ("marks", [[1, None]]),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused_by_name(field: str, bad: Any) -> None:
    data = {"verb": "job", **vars(JOB)}
    assert est.decode_message(json.dumps(data)) == JOB
    what = "a message is no JSON" if "\\ud" in ascii(bad) else f"JobRecord: {field} can't be"
    with pytest.raises(est.ProtocolError, match=f"^{what}"):
        est.decode_message(json.dumps(data | {field: bad}))


def test_values_of_tables_are_judged_and_whole_seconds_are_times() -> None:
    run = example_of(est.RunRecord)
    assert est.decode_message(json.dumps(run | {"machines": {"a": "b"}, "created": 5})).created == 5
    with pytest.raises(est.ProtocolError, match="machines can't be"):
        est.decode_message(json.dumps(run | {"machines": {"a": "b", "c": 5}}))


def test_a_text_that_utf8_cannot_carry_does_not_stop_a_message() -> None:
    """A file name that is no UTF-8, in an error's text, must not cost the result."""
    failed = replace(JOB, state=est.State.FAILED, error="can't read caf\udce9.json: 없음 😀")
    arrived = est.decode_message(est.encode_message(failed).encode().decode())
    assert arrived == replace(failed, error="can't read caf?.json: 없음 😀")
    with pytest.raises(est.ProtocolError):  # nor does it get in as an escape, wherever it hides
        est.decode_message('{"verb":"answer","id":1,"result":{"a":[{"\\uD83D":1}]}}')
    pair = est.decode_message('{"verb":"answer","id":1,"result":{"a":"\\ud83d\\ude00"}}')
    assert pair.result == {"a": "😀"}


def decode_or_refuse(text: str) -> Any:
    """The message, or None; whatever else is raised fails the test."""
    try:
        return est.decode_message(text)
    except est.ProtocolError as refused:
        assert len(str(refused)) < 1000, "a stranger must not fill our log"
        return None


RUBBISH = [
    "", " ", "null", "[]", "{}", "0", '"hello"', "NaN", "{", '{"verb":null}', '{"verb":[]}', '{"verb":{}}', "\ufeff{}",
    '{"verb":"Hello"}', '{"verb":"__class__"}', '{"verb":"hello"', "\0", '{"verb":"ask","id":' + "9" * 5000 + "}",
    "[" * 100_000, '{"verb":"notice","text":' + "9" * 4000 + "}", '{"verb":"' + "x" * 10_000 + '"}', '{"a":' * 100_000,
    '{"verb":"\\ud800"}',
]  # fmt: skip
WRONG: list[Any] = [None, True, -1, 1 << 64, 1.5, 1e999, "", "../x", [], [[]], [{}], {}, {"a": [None]}, "\ud800"]


def mutate(random: random.Random, text: str) -> str:
    """The message with something wrong: a value exchanged, a key lost, characters changed, or a part cut away."""
    data = json.loads(text)
    key = random.choice(list(data))
    match random.randrange(7):
        case 0:
            del data[key]
        case 1 | 2:
            data[key] = random.choice(WRONG)
        case 3:
            data[random.choice(["", "verb", "run", "state", "x"])] = data[key]
        case 4:
            position = random.randrange(len(text))
            return text[:position] + random.choice('{}[]",:\\u0e-\x00é') + text[position + random.randrange(3) :]
        case 5:
            return text[: random.randrange(len(text))]
        case 6:
            return text.replace(random.choice(text), random.choice(["", "\x7f", '"', "9", "[["]))
    return json.dumps(data, ensure_ascii=random.random() < 0.5).encode("utf-8", "replace").decode()


def test_ten_thousand_wrong_texts_are_messages_or_protocol_errors() -> None:
    chance = random.Random(9900)
    texts = [est.encode_message(JOB), est.encode_message(est.Submit(RUN, "n", est.Kind.DEPLOY, "all", "브랜치"))]
    texts += [json.dumps(example_of(cls)) for cls in est.MESSAGES]
    arrived = 0
    for text in RUBBISH:
        assert decode_or_refuse(text) is None
    for _ in range(10_000):
        if message := decode_or_refuse(mutate(chance, chance.choice(texts))):
            arrived += 1
            again = est.encode_message(message)
            assert est.decode_message(again.encode().decode()) == message, "what got in can be passed on"
    assert 500 < arrived < 8000


@quick
@given(st.text() | (JSON | st.dictionaries(st.sampled_from(["verb", "run", "host", "id"]), JSON)).map(json.dumps))
def test_any_text_is_a_message_or_a_protocol_error(text: str) -> None:
    decode_or_refuse(text)


@pytest.mark.parametrize("open_, close", [("[", "]"), ('{"a":', "}")])
def test_no_depth_of_nesting_gets_further_than_the_decoder(open_: str, close: str) -> None:
    for depth in (1, 2, 30, 300, *range(880, 1000, 3), 1100, 50_000):
        inner = open_ * depth + "1" + close * depth
        assert decode_or_refuse(f'{{"verb":"notice","text":{inner}}}') is None
        assert decode_or_refuse(f'{{"verb":{inner}}}') is None
        assert decode_or_refuse(inner) is None


@quick
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1), st.binary(max_size=100))
def test_a_chunk_arrives_as_it_was_sent(channel: int, offset: int, data: bytes) -> None:
    assert est.decode_chunk(est.encode_chunk(channel, offset, data)) == (channel, offset, data)


def test_ten_thousand_wrong_frames_are_chunks_or_protocol_errors() -> None:
    chance = random.Random(9901)
    good = 0
    for _ in range(10_000):
        frame = bytearray(est.encode_chunk(chance.randrange(1 << 32), chance.randrange(1 << 64), chance.randbytes(8)))
        frame[chance.randrange(len(frame))] = chance.randrange(256)
        wrong = chance.choice([bytes(frame), bytes(frame[: chance.randrange(30)]), chance.randbytes(30)])
        try:
            channel, offset, data = est.decode_chunk(wrong)
        except est.ProtocolError:
            assert len(wrong) < 13 or wrong[0] != 1
        else:
            good += 1
            assert wrong == struct.pack(">BIQ", 1, channel, offset) + data
    assert 1000 < good < 9000


@quick
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**63), st.binary(max_size=300), st.integers(1, 200))
def test_a_squeezed_chunk_is_the_same_chunk(channel: int, offset: int, data: bytes, times: int) -> None:
    data = data * times
    for form in (est.DEFLATED_FORM, est.BARE_FORM):
        frame = est.encode_chunk(channel, offset, data[: est.CHUNK_BYTES], form)
        assert est.decode_chunk(frame) == (channel, offset, data[: est.CHUNK_BYTES])


@quick
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1))
def test_a_size_is_told_apart_from_bytes(channel: int, size: int) -> None:
    """Only who asked for sizes gets them; to everybody else they are no chunk."""
    frame = est.encode_growth(channel, size)
    assert est.decode_growth(frame) == (channel, size)
    assert est.decode_growth(frame + b"x") is None and est.decode_growth(frame[:-1]) is None
    for data in (b"", b"x"):
        assert est.decode_growth(est.encode_chunk(channel, size, data)) is None
    with pytest.raises(est.ProtocolError):
        est.decode_chunk(frame)


def test_a_frame_that_inflates_without_end_is_refused() -> None:
    for form, bits in ((est.DEFLATED_FORM, 15), (est.BARE_FORM, -15)):
        head = est.CHUNK_HEADER.pack(form, 1, 0)
        for size in (est.LARGE_CHUNK_BYTES + 1, 50_000_000):
            with pytest.raises(est.ProtocolError):
                est.decode_chunk(head + zlib.compress(b"x" * size, wbits=bits))
        whole = zlib.compress(b"line\n" * 5000, wbits=bits)
        for body in (b"rubbish", b"", whole[:-4]):
            with pytest.raises(est.ProtocolError):
                est.decode_chunk(head + body)


def texts_in(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    inner = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in inner for text in texts_in(item)]


@quick
@given(messages())
def test_every_field_that_is_no_log_is_one_printable_line(message: Any) -> None:
    """So that a version, an error, a name or a file name never makes a line that looks like another host's."""
    arrived = est.decode_message(est.encode_message(message))
    if isinstance(arrived, est.Submit):
        arrived = replace(arrived, branch="", commits={})  # judged as they are: require_branch refuses
    if isinstance(arrived, est.Ask):
        return
    if isinstance(arrived, est.Answer):
        rows = arrived.result.get("hosts")
        for row in rows if isinstance(rows, list) else ():
            if isinstance(row, dict):
                row.pop("text", None)  # a log's
    assert all(text.isprintable() for text in texts_in(vars(arrived)))


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ("v1\n[127.0.0.3] ✓ 완료 v2", "v1 [127.0.0.3] ✓ 완료 v2"),
        ("a\r\x1b[2Jb\u2028c\u202ed\u200b\ud800", "a \ufffd[2Jb c\ufffdd\ufffd\ufffd"),
        ("한글　파일", "한글 파일"),
        ("plain ✓", "plain ✓"),
    ],
)
def test_one_line(raw: str, line: str) -> None:
    assert est.one_line(raw) == line


def test_what_is_printable_and_not_seen_is_no_short_way() -> None:
    """A grapheme joiner makes two names that look alike."""
    arrived = est.decode_message('{"verb":"cancel","run":"' + RUN + '","by":"yq\u034f"}')
    assert arrived.by == "yq\ufffd"


def test_a_log_alone_has_lines() -> None:
    answer = est.Answer(1, {"hosts": [{"host": "a\nb", "text": "one\ntwo\n"}, 3], "text": "x\ny"})
    arrived = est.decode_message(est.encode_message(answer)).result
    assert arrived == {"hosts": [{"host": "a b", "text": "one\ntwo\n"}, 3], "text": "x y"}
