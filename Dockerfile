FROM python:3.13-slim AS build
WORKDIR /src
COPY requirements-runtime.lock pyproject.toml README.md ./
COPY client client
RUN python -m venv /app \
    && /app/bin/pip install --no-cache-dir --require-hashes --requirement requirements-runtime.lock
COPY settings.py celeryconfig.py ./
COPY schema schema
COPY workers workers
COPY submit_tasks submit_tasks
COPY api api
COPY cli cli
COPY devstack devstack
RUN /app/bin/pip install --no-cache-dir --no-deps . ./client

FROM python:3.13-slim
RUN useradd --uid 10001 --create-home --home-dir /var/lib/bulk-submit bulk-submit
COPY --from=build /app /app
ENV PATH=/app/bin:$PATH PYTHONUNBUFFERED=1
USER 10001
WORKDIR /var/lib/bulk-submit
ENTRYPOINT ["bulk-submit"]
CMD ["--help"]
