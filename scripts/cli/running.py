"""Running a command: exit codes, one sentence for each error, the main process alone speaks."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from erase.plugins import PluginError
from erase.prompts.errors import ErasureError
from erase.prompts.reading import why
from erase.scripts.cli.complaints import UnknownOption
from erase.scripts.cli.light import only_describes, options_can_be_read, stood_in
from erase.scripts.cli.stopping import exit_code, terminable

LEANER = (
    "do less at a time: a smaller batch_size (of latents, of generate), train.accumulation 4, "
    "train.gradient_checkpointing true, a narrower scope such as xattn; docs/performance.md says "
    "what each saves"
)


def run(
    main: Callable[[list[str] | None], None],
    argv: list[str] | None = None,
    libraries: bool = True,
    resumes: bool = False,
) -> int:
    """Run a command: 0 when done, 2 for bad input or too little memory (one sentence on stderr),
    130 for Ctrl-C, 143 for SIGTERM.

    Of several processes the main one alone speaks; all tell their errors. `libraries`: whether its
    work needs torch and diffusers, which take seconds to load; if not, it prints only at its end.
    `resumes`: whether the same command goes on with what it saved before it was stopped.
    """
    _speak_utf8()
    words = sys.argv[1:] if argv is None else argv
    try:
        if (only_describes(words) or not libraries) and _describe(main, argv):
            return 0
        if options_can_be_read(words):
            _check_options(main, argv)
        with _settled(words), terminable():
            _work(main, argv)
    except ErasureError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not (
            isinstance(error, MemoryError)
            or type(error).__name__ == "OutOfMemoryError"
            or "DefaultCPUAllocator" in str(error)
        ):
            raise
        print(f"error: out of memory; {LEANER}", file=sys.stderr)
        return 2
    except OSError as error:  # of a path or a disk that no check foresaw
        if error.errno is None:
            raise
        print(
            f"error: {f'{error.filename}: ' if error.filename else ''}{why(error)}", file=sys.stderr
        )
        return 2
    except KeyboardInterrupt as stopped:
        print(f"stopped{_going_on() if resumes else ''}", file=sys.stderr)
        return exit_code(stopped)
    return 0


def _going_on() -> str:
    """What a command that resumes says when it is stopped."""
    files = sys.modules.get("erase.files")  # which is there once anything is
    if files is None or not files.placed:
        return "; nothing was saved yet"
    return f"; the same command goes on with what is saved, last {files.placed[-1]}"


def _describe(main: Callable[[list[str] | None], None], argv: list[str] | None) -> bool:
    """Print help or version, which ends the program, or a list; False where stand-ins are not
    enough for that, and the libraries themselves will do."""
    try:
        with stood_in():
            main(argv)
        return True
    except Exception as error:
        if isinstance(error, ErasureError | OSError) and not isinstance(error, PluginError):
            raise
        logging.getLogger("erase").debug("help needs the libraries themselves: %r", error)
    return False


def _check_options(main: Callable[[list[str] | None], None], argv: list[str] | None) -> None:
    """Refuse an option that there is not before the libraries are loaded; any other fault is told
    with them."""
    try:
        with stood_in(options_only=True):
            main(argv)
    except UnknownOption:
        raise
    except Exception as error:
        logging.getLogger("erase").debug("options as read without libraries: %r", error)


def _work(main: Callable[[list[str] | None], None], argv: list[str] | None) -> None:
    from erase.models.precision import pin_mkl_rounding
    from erase.parallel.processes import processes

    pin_mkl_rounding()
    _mute_libraries()
    if processes().is_main_process:
        main(argv)
    else:
        with (
            open(os.devnull, "w", encoding="utf-8") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            main(argv)


def note(text: str) -> None:
    """A line on stderr, unless --quiet."""
    if logging.getLogger("erase").level <= logging.INFO:
        print(text, file=sys.stderr)


@contextmanager
def _settled(argv: list[str]) -> Iterator[None]:
    """Decisions on the user's behalf are said, unless --quiet; afterwards log and bars are as they
    were."""
    logging.basicConfig(format="%(message)s")
    log, bars = logging.getLogger("erase"), os.environ.get("TQDM_DISABLE")
    if os.environ.get("RANK", "0") == "0":
        log.setLevel(logging.INFO)
        if "--quiet" not in argv and "torch" not in sys.modules:
            print("loading torch and diffusers ...", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        log.setLevel(logging.NOTSET)
        os.environ.pop("TQDM_DISABLE", None)
        if bars is not None:
            os.environ["TQDM_DISABLE"] = bars


def hush() -> None:
    """No bars, ours or a library's, and no notes, until the command ends."""
    os.environ["TQDM_DISABLE"] = "1"
    logging.getLogger("erase").setLevel(logging.WARNING)


def _speak_utf8() -> None:
    """UTF-8 on both streams, whatever the console's code page; what no encoding holds (half a
    surrogate in a file's name) is escaped."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def alone(command: str) -> None:
    """Refuse several processes, for a command whose work is not shared: each would write the same
    files."""
    from erase.parallel.processes import processes

    if (count := processes().num_processes) > 1:
        raise ErasureError(
            f"{command} is work for one process, not {count}; run it without accelerate launch or "
            "torchrun"
        )


def _mute_libraries() -> None:
    """Only our own progress bars, not those of every file that a library loads, and of the
    libraries only errors: they tell of every prompt that is cut, which a line of ours counts, and
    of every try to reach the hub, whose client has a handler of its own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.disable_progress_bar()
        library.set_verbosity_error()
    hub = logging.getLogger("huggingface_hub")
    hub.propagate = False
    hub.setLevel(logging.ERROR)
