# The web nodes themselves, where no page passes clearcoat on its way to the cache (docs/vcl-push.md). clearcoat puts this in
# the place of the one backend; what stands between "for each" and "end of for each" is written once for every web node
# that has a weight.
import directors;

# As clearcoat checks them (health.web). One pass makes a node of a new VCL healthy, and none is used before it has passed.
probe web {
    @REQUEST@
    .expected_response = @EXPECT@;
    .interval = @INTERVAL@s;
    .timeout = @TIMEOUT@s;
    .window = @WINDOW@;
    .threshold = @THRESHOLD@;
}

# For each web node.
backend @NAME@ {
    .host = "@HOST@";
    .port = "@PORT@";
    # Magento's slowest pages (imports and reports in the admin) take minutes.
    .first_byte_timeout = 600s;
    .probe = web;
}
# End of for each.

sub vcl_init {
    new webs = directors.@DIRECTOR@();
    # For each web node.
    webs.add_backend(@ADDED@);
    # End of for each.
    @READY@
}

sub vcl_recv {
    set req.backend_hint = webs.backend(@BY@);
}

# What may be asked twice is asked of the next one, and of each once at most. Not left to the director: it could come back to
# the one that just failed.
sub vcl_backend_error {
    if ((bereq.method == "GET" || bereq.method == "HEAD") && bereq.retries < @OTHERS@) {
        # For each web node.
        if (beresp.backend == @NAME@) {
            set bereq.backend = @NEXT@;
        }
        # End of for each.
        return (retry);
    }
}

# A host that is gone does not refuse, it is silent. There are others, so do not listen long.
sub vcl_backend_fetch {
    if (bereq.method == "GET" || bereq.method == "HEAD") {
        set bereq.connect_timeout = 1s;
    }
}
