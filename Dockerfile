# docker build -t clearcoat .
#
# Builds with and without BuildKit. Where no image can be pulled, or crates cannot be fetched inside a build,
# deploy/build-image.sh puts a binary built outside into the `frame` stage.
ARG BUILD_BASE=rust:1-bookworm
ARG RUN_BASE=debian:bookworm-slim

# Everything but the binary. It comes first because the classic builder builds all stages above the wanted one,
# and it runs no command because its base need not have a shell.
FROM ${RUN_BASE} AS frame
# What depends on the build (version, revision, created) comes from deploy/build-image.sh.
LABEL org.opencontainers.image.title="clearcoat" \
      org.opencontainers.image.description="A proxy in front of a Varnish fleet: balances its traffic and fans out every Magento 2 purge" \
      org.opencontainers.image.vendor="The clearcoat maintainers" \
      org.opencontainers.image.authors="The clearcoat maintainers" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY deploy/clearcoat.toml /etc/clearcoat/clearcoat.toml
# A volume starts with the owner of the directory that it covers.
COPY --chown=10001:10001 deploy/state/ /var/lib/clearcoat/
VOLUME /var/lib/clearcoat
# `clearcoat.toml` in the working directory is what every command reads.
WORKDIR /etc/clearcoat
# By number, so that Kubernetes can see that it is not root (runAsNonRoot).
USER 10001:10001
# edge, origin, purge, admin
EXPOSE 8080 8081 6081 9180
STOPSIGNAL SIGTERM
# Ready: it has seen a fleet, the edge is open, and it does not drain.
HEALTHCHECK --interval=5s --timeout=3s --start-period=15s CMD ["clearcoat", "status", "--ready"]
ENTRYPOINT ["clearcoat"]
CMD ["serve"]

FROM ${BUILD_BASE} AS build
# PCRE2 inside the binary: whether the build base happens to have the library, and the runtime base the same one, no longer matters.
ENV PCRE2_SYS_STATIC=1
# The client of etcd is made of etcd's own interface definitions.
RUN apt-get update && apt-get install -y --no-install-recommends protobuf-compiler libprotobuf-dev && rm -rf /var/lib/apt/lists/*
RUN cargo install --locked --quiet cargo-auditable@0.7.7
WORKDIR /src
COPY . .
# With the list of all crates inside (.dep-v0), for scanners. Without debug information, but with the names that a backtrace needs.
RUN cargo auditable build --release --locked --bin clearcoat && strip --strip-debug target/release/clearcoat
RUN deploy/third-party.sh >target/third-party.txt

FROM frame
# Debian's slim image has no CA certificates; the Rust image has.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /src/target/release/clearcoat /usr/local/bin/clearcoat
COPY --from=build /src/target/third-party.txt /usr/share/doc/clearcoat/third-party.txt
