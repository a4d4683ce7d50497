"""Studies behind a server, a database or a gRPC proxy, which may be gone for a while."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import GrpcStorageProxy, RDBStorage
from sqlalchemy import event
from sqlalchemy.engine import Dialect
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, SQLAlchemyError

from ..error_lines import first_line

PATIENCE = 300.0
"""Seconds for which a search waits for a server that was there and does not answer."""

_FIRST_ANSWER = 20.0  # seconds for which a gRPC proxy is waited for at first


def open_database(address: str) -> RDBStorage:
    """Open a study's database. Later on, connections that are lost are made again, for up to [`PATIENCE`].

    Raises:
        SQLAlchemyError, ImportError: when it cannot be opened now.
    """
    for attempt in range(2):
        try:
            storage = RDBStorage(address, engine_kwargs={"pool_pre_ping": True})
            break
        except (IntegrityError, ProgrammingError, OperationalError):
            if attempt:
                raise
            time.sleep(2)  # another process may be making the tables at this moment
    event.listen(storage.engine, "do_connect", _connect_patiently)
    return storage


def _connect_patiently(dialect: Dialect, record: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
    """Connect to a database, and try again with growing pauses while it does not answer."""
    end, pause = time.monotonic() + PATIENCE, 0.5
    while True:
        try:
            return dialect.connect(*arguments, **options)
        except dialect.loaded_dbapi.OperationalError:
            if time.monotonic() + pause > end:
                raise
            time.sleep(pause)
            pause = min(2 * pause, 15)


def open_proxy(host: str, port: int) -> GrpcStorageProxy:
    """Open a study behind a gRPC proxy. Later on, calls wait for a proxy that is gone, for up to [`PATIENCE`].

    Raises:
        ConnectionError: when no proxy answers now.
    """
    import grpc

    class Patient(grpc.UnaryUnaryClientInterceptor):
        def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
            return continuation(details._replace(wait_for_ready=True, timeout=PATIENCE), request)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        proxy = GrpcStorageProxy(host=host, port=port)
    proxy.wait_server_ready(timeout=_FIRST_ANSWER)
    patient = type(proxy._stub)(grpc.intercept_channel(proxy._channel, Patient()))
    proxy._stub, proxy._cache = patient, type(proxy._cache)(patient)
    return proxy


@contextmanager
def said_in_one_line(address: str) -> Iterator[None]:
    """Turn the error of a server that no longer answers into a `RuntimeError` that names it.

    Args:
        address (`str`): address of the storage as it may be shown.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (StorageInternalError, SQLAlchemyError)) and not _is_from_grpc(error):
            raise
        reason = (_is_from_grpc(error) and error.details()) or error.__cause__ or error
        raise RuntimeError(
            f"the storage {address} does not answer ({first_line(reason)}): when it does, the same command goes on"
        ) from None


def _is_from_grpc(error: Exception) -> bool:
    """Whether an error is one of gRPC, without importing it."""
    return any(f"{cls.__module__}.{cls.__name__}" == "grpc.RpcError" for cls in type(error).__mro__)
