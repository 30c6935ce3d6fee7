"""What this server says of itself: CapabilityStatement, and the keys that senders encrypt to."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Response
from jwcrypto.jwk import JWKSet

from api.context import InContext
from api.errors import json_response

IG = "http://hl7.org/fhir/uv/bulkdata"
RELEASED = "2026-11-23"

router = APIRouter()


@router.get("/metadata")
def metadata(context: InContext) -> Response:
    """The CapabilityStatement."""
    context.require_tenant()
    operations = [
        {"name": name, "definition": f"{IG}/OperationDefinition/{name}"}
        for name in ("bulk-submit", "bulk-submit-status")
    ]
    statement: dict[str, Any] = {
        "resourceType": "CapabilityStatement",
        "status": "active",
        "date": RELEASED,
        "kind": "instance",
        "instantiates": [f"{IG}/CapabilityStatement/bulk-data", f"{IG}/CapabilityStatement/bulk-submit"],
        "implementation": {"description": "Bulk Submit Data Consumer", "url": context.base},
        "fhirVersion": "4.0.1",
        "format": ["application/fhir+json"],
        "rest": [{"mode": "server", "operation": operations}],
    }
    return json_response(statement)


@router.get("/.well-known/jwks.json")
def jwks(context: InContext) -> Response:
    """Our public keys (RFC 7517)."""
    context.require_tenant()
    private = context.settings.private_jwks.get_secret_value()
    public = json.loads(JWKSet.from_json(private).export(private_keys=False)) if private else {"keys": []}
    return json_response(public, media_type="application/json", headers={"Cache-Control": "max-age=300"})
