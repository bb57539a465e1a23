"""URLs lose what is secret and keep what names the object."""

from __future__ import annotations

import pytest

from ragkit.credentials import public_url, safe_cause, without_credentials


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/a/b c.pdf", "s3://bucket/a/b c.pdf"),
        ("s3://AKIA1234:s3cr3t/x@bucket/a.pdf", "s3://bucket/a.pdf"),  # it should have been escaped
        ("postgresql://u:p#ss@host/db?query=SELECT+1", "postgresql://host/db?query=SELECT+1"),
        ("https://host:8080/~a@b/x", "https://host:8080/~a@b/x"),
        (
            "mssql+pyodbc:///?odbc_connect=Driver%3D%7BODBC+18%7D%3BServer%3Dh%3BUID%3Dbob%3BPWD%3D%7Ba%3Bserver%3Db%7D",
            "mssql+pyodbc:///?odbc_connect=Driver%3D%7BODBC+18%7D%3BServer%3Dh",
        ),
        ("bigquery://p/d?credentials_base64=ab&location=eu", "bigquery://p/d?location=eu"),
        ("snowflake://a/db?private_key_passphrase=ab&pass=cd&role=r", "snowflake://a/db?role=r"),
        ("s3://AKIA1234:s3cr3t@bucket/a.pdf", "s3://bucket/a.pdf"),
        ("https://user:p%40ss@host:8080/x?id=3", "https://host:8080/x?id=3"),
        ("https://ghp_token@host/x", "https://host/x"),
        ("https://h/x?id=3&token=abc&page=2#frag", "https://h/x?id=3&page=2"),
        ("https://h/x?X-Amz-Signature=1&X-Amz-Credential=2&versionId=7", "https://h/x?versionId=7"),
        ("https://h/x?sv=1&se=2&sp=r&sig=zzz&comp=1", "https://h/x?comp=1"),
        ("https://h/x?se=2", "https://h/x?se=2"),
        ("https://h/x?api_key=1&keyword=2&monkey=3", "https://h/x?keyword=2"),
        ("abfs://container@account.dfs.core.windows.net/x", "abfs://container@account.dfs.core.windows.net/x"),
        ("postgresql+psycopg://u:p@db/name?query=SELECT+1", "postgresql+psycopg://db/name?query=SELECT+1"),
        ("sqlite:////abs/x.db?query=SELECT 1", "sqlite:////abs/x.db?query=SELECT+1"),
    ],
)
def test_the_name_of_a_url_holds_no_credentials(url: str, shown: str):
    assert public_url(url) == shown
    assert public_url(shown) == shown


def test_the_same_object_has_one_name_whoever_signs_for_it():
    signed = [f"https://b.s3.amazonaws.com/k?X-Amz-Date={day}&X-Amz-Signature={day}f" for day in (1, 2)]
    assert public_url(signed[0]) == public_url(signed[1])


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("https://user:p%40ss@host/x", "cannot log in to https://user:p%40ss@host/x as user with p@ss"),
        ("https://h/x?token=abc%2Fdef", "bad token abc/def or abc%2Fdef"),
        ("postgresql://bob:hunter2@h/d", "password hunter2 refused for postgresql://bob:hunter2@h/d"),
        ("postgresql://bob:x/hunter2@h/d", "password x/hunter2 refused"),
        ("mssql+pyodbc:///?odbc_connect=Server%3Dh%3BPWD%3Dhunter2", "Login failed (Server=h;PWD=hunter2)"),
    ],
)
def test_messages_lose_what_is_secret(url: str, message: str):
    shown = without_credentials(message, url)
    for secret in ("p@ss", "p%40ss", "abc/def", "abc%2Fdef", "hunter2"):
        assert secret not in shown
    assert "***" in shown


def test_a_cause_that_would_show_a_secret_in_a_traceback_is_left_out():
    url = "https://user:hunter2@host/x"
    assert safe_cause(ValueError("no route to host"), url) is not None
    assert safe_cause(ValueError("bad password hunter2"), url) is None
    outer = RuntimeError("it failed")
    outer.__cause__ = ValueError("hunter2")
    assert safe_cause(outer, url) is None
