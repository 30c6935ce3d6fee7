"""What every request needs: settings, database, artifact store, the tenant it is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

import sqlalchemy as sa
from fastapi import Depends, Request

from api.errors import Refusal
from schema import submissions
from settings import Settings
from workers.artifact_store import ArtifactStore


@dataclass(frozen=True, slots=True)
class Context:
    """The application's own, and the request's tenant by name."""

    settings: Settings
    engine: sa.Engine
    store: ArtifactStore
    tenant: str

    @property
    def base(self) -> str:
        """The FHIR base URL under which the tenant is reached."""
        return f"{self.settings.public_url.rstrip('/')}/{self.tenant}/fhir"

    def tenant_id(self, connection: sa.Connection) -> int:
        """The tenant's id; a `Refusal` (404) if there is none of that name."""
        tenant_id = submissions.find_tenant(connection, self.tenant)
        if tenant_id is None:
            raise Refusal(404, "there is no such tenant")
        return tenant_id

    def require_tenant(self) -> None:
        """Raise a `Refusal` (404) if there is no tenant of that name."""
        with self.engine.begin() as connection:
            self.tenant_id(connection)


def _context(request: Request, tenant: str) -> Context:
    if "\0" in tenant:
        raise Refusal(404, "there is no such tenant")
    state = request.app.state
    return Context(
        cast("Settings", state.settings), cast("sa.Engine", state.engine), cast("ArtifactStore", state.store), tenant
    )


InContext = Annotated[Context, Depends(_context)]
