"""One table of errors for both protocols."""

import grpc
import pytest

from service.errors import BY_SLUG, FieldError, ServiceError
from service.rpc.wire import from_error, to_error


@pytest.mark.parametrize("error", BY_SLUG.values())
def test_every_error_has_its_row_and_survives_the_wire(error: type[ServiceError]) -> None:
    assert 400 <= error.status < 600
    assert grpc.StatusCode[error.grpc]
    sent = error("why", fields=[FieldError("top_k", "too big")], retry_after_s=1.5)
    back = from_error(to_error(sent))
    assert type(back) is error
    assert (back.detail, back.fields, back.retry_after_s) == ("why", sent.fields, 1.5)
    assert from_error(to_error(error("why"))).retry_after_s is None


def test_no_two_errors_share_a_name() -> None:
    assert len(BY_SLUG) == len(ServiceError.__subclasses__())


def test_an_error_from_a_newer_worker_is_an_internal_one() -> None:
    message = to_error(BY_SLUG["not-found"]("gone"))
    message.code = "brand-new"
    assert from_error(message).slug == "internal"
