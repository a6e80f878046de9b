# Several clearcoats before this fleet, any of which will do: requests take turns, and one that is not there costs no
# reader an error. `clearcoat vcl` puts this in the place of the one backend where it is given several origins; what stands
# between "for each" and "end of for each" is written once for every clearcoat.
import directors;

# Whether a clearcoat is there. A purge goes to no web node: clearcoat refuses it by itself, whatever the web nodes do.
# Without this, a POST, which must not be asked twice, would fail in its turn for as long as a clearcoat is down.
probe clearcoat {
    .request =
        "PURGE /.clearcoat/probe HTTP/1.1"
        "Host: clearcoat"
        "Connection: close";
    .expected_response = 405;
    .interval = 1s;
    .timeout = 1s;
    # Down after three failures, up with one pass, and up at first: a VCL that was just loaded serves.
    .window = 3;
    .threshold = 1;
    .initial = 1;
}

# For each clearcoat.
backend origin_@NUMBER@ {
    .host = "@HOST@";
    .port = "@PORT@";
    # Magento's slowest pages (imports and reports in the admin) take minutes.
    .first_byte_timeout = 600s;
    .probe = clearcoat;
}
# End of for each.

sub vcl_init {
    new origins = directors.round_robin();
    # For each clearcoat.
    origins.add_backend(origin_@NUMBER@);
    # End of for each.
}

sub vcl_recv {
    set req.backend_hint = origins.backend();
}

# What may be asked twice is asked of the next one, and of each once at most. Not left to the director: in the turns of
# other requests it could come back to the one that just failed.
sub vcl_backend_error {
    if ((bereq.method == "GET" || bereq.method == "HEAD") && bereq.retries < @OTHERS@) {
        # For each clearcoat.
        if (beresp.backend == origin_@NUMBER@) {
            set bereq.backend = origin_@NEXT@;
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
