"""The FHIR front door. Thin: every decision is a call into `submit_tasks` or `schema`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import sqlalchemy as sa
from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError

from api import conformance, errors, files, metrics, resources, status, submit
from api.errors import Refusal, json_response
from schema.database import DATABASE_ERRORS, create_engine
from settings import Settings
from settings import settings as environment
from submit_tasks.outcomes import Issue
from workers.artifact_store import ArtifactStore


def create_app(settings: Settings) -> FastAPI:
    """The application for these settings."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.settings = settings
        app.state.engine = create_engine(settings, application="bulk-submit api", pooled=True)
        app.state.store = ArtifactStore(settings.artifact_store_url)
        yield
        app.state.engine.dispose()

    app = FastAPI(
        title="Bulk Submit Data Consumer",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    errors.install(app)

    @app.exception_handler(RequestValidationError)
    def _not_understood(_: object, error: RequestValidationError) -> Response:
        if any(item["loc"][0] == "path" for item in error.errors()):
            return errors.outcome_response([Issue("error", "not-found", errors.NOTHING_HERE)], status=404)
        names = ", ".join(str(item["loc"][-1]) for item in error.errors())
        return errors.outcome_response([Issue("error", "invalid", f"not understood: {names}")], status=400)

    @app.get("/healthz")
    def healthz() -> Response:
        """Whether the API and its database answer."""
        try:
            with app.state.engine.connect() as connection:
                connection.execute(sa.text("SELECT 1"))
        except DATABASE_ERRORS as error:
            raise Refusal(503, "the database does not answer", code="transient") from error
        return json_response({"status": "ok"}, media_type="application/json")

    app.include_router(metrics.router)
    for router in (submit.router, status.router, files.router, conformance.router, resources.router):
        app.include_router(router, prefix="/{tenant}/fhir")
    return app


def from_environment() -> FastAPI:
    """The application for the environment's settings: what `bulk-submit api` serves."""
    return create_app(environment())
