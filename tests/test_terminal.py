"""terminal.py: what reaches a terminal."""

from rwkv_cpp.terminal import harmless


def test_control_characters_are_written_out():
    """I-05"""
    assert harmless("a\x1b[2Jb\rc\x9bd\x7f\x00") == "a\\x1b[2Jb\\x0dc\\x9bd\\x7f\\x00"
    assert harmless("tab\tnewline\nümläut 你好 🙂") == "tab\tnewline\nümläut 你好 🙂"
