vcl 4.1;

# Magento 2 behind clearcoat, for Varnish 7.x. docs/vcl.md says how to install it and what differs from Magento's own.
# `clearcoat vcl` fills in the three placeholders. The file for Varnish 6.0 is the same but for the parts between
# "only here" and "end of only here".

import std;

# The origin listener of clearcoat, and no web node: which nodes there are, whether they are well and who gets the next
# request is clearcoat's business, so this file never changes when web nodes come and go. There is no probe for the same
# reason: a probe would say "all sick" about one listener, where clearcoat still has nodes to choose from.
backend origin {
    .host = "@ORIGIN_HOST@";
    .port = "@ORIGIN_PORT@";
    # Magento's slowest pages (imports and reports in the admin) take minutes.
    .first_byte_timeout = 600s;
}

# The addresses of clearcoat. Nobody else purges here: a purge that reaches one Varnish only is a purge lost on the others.
acl purge {
    @PURGE_ALLOW@
}

sub vcl_recv {
    # Host names are case-insensitive. Without this, one page would be two objects.
    set req.http.Host = std.tolower(req.http.Host);

    # "GET https://shop/page" and "GET /page" are one request.
    if (req.url ~ "^https?://[^/?]") {
        set req.http.Host = std.tolower(regsub(req.url, "^https?://([^/?]+).*$", "\1"));
        set req.url = regsub(req.url, "^https?://[^/?]+", "");
    }
    if (req.url !~ "^/" && req.url != "*") {
        return (synth(400, "Bad request target"));
    }

    if (req.method == "PURGE") {
        call take_purge;
    }

    # This path is for clearcoat to talk to Varnish. Web nodes never see it. Below trial/ are pages that clearcoat's origin
    # answers itself, to see whether purges take them out.
    if (req.url ~ "^/\.clearcoat(/|\?|$)" &&
        (req.url !~ "^/\.clearcoat/trial/" || req.method != "GET" || remote.ip !~ purge || client.ip !~ purge)) {
        return (synth(404, "Not found"));
    }

    # What Magento's pages, REST and GraphQL use. Anything else is refused here: piping it, as is usual, hands the
    # connection over to the web node and with it every further request, past all the rules of this file.
    if (req.method !~ "^(GET|HEAD|POST|PUT|PATCH|DELETE|OPTIONS)$") {
        return (synth(405, "Method not allowed"));
    }
    if (req.method == "GET" && req.http.Upgrade ~ "(?i)^websocket$") {
        return (pipe);
    }
    if (req.method != "GET" && req.method != "HEAD") {
        return (pass);
    }

    # Magento takes "https" and "on" for a secure request and everything else for a plain one. Written in one way,
    # because it is part of the key: otherwise a stranger's odd spelling would put pages full of https links under the
    # key of the plain pages.
    if (req.http.X-Forwarded-Proto ~ "(?i)^(https|on)$") {
        set req.http.X-Forwarded-Proto = "https";
    } else if (req.http.X-Forwarded-Proto) {
        set req.http.X-Forwarded-Proto = "http";
    }
    std.collect(req.http.Cookie, "; ");

    # Personal by nature: never in the cache, and no hit-for-miss object for each of their URLs either.
    if (req.url ~ "^[^?]*/(checkout|customer|catalogsearch)(/|\?|$)" || req.url ~ "^/(pub/)?health_check\.php") {
        return (pass);
    }
    # A signed-in GraphQL client that does not say which cache key its answers have.
    if (req.url ~ "^[^?]*/graphql/?(\?|$)" && req.http.Authorization ~ "(?i)^Bearer" && !req.http.X-Magento-Cache-Id) {
        return (pass);
    }

    call strip_marketing;

    # Files are the same for everybody: without cookies they share one object.
    if (req.url ~ "^/(pub/)?(media|static)/") {
        unset req.http.Cookie;
    }

    # Accept-Encoding is left alone: Varnish fetches gzip, stores it once and unpacks it for a client that cannot.

    # How long after its TTL a page may be served while a new one is fetched behind it. Objects keep three days of grace
    # (below); all of it is used only when the backend is sick, that is when an operator sets it so by
    # "varnishadm backend.set_health" or adds a probe. Grace is about time only and cannot outlive a purge: a lookup
    # tests an object against the bans before it looks at its age, and what a ban matches is gone for good.
    if (std.healthy(req.backend_hint)) {
        set req.grace = 300s;
    }
    return (hash);
}

# Ends the request in every case: no PURGE goes on to the backend.
sub take_purge {
    # remote.ip is who holds the connection, client.ip is who a PROXY header says is behind it (the same without PROXY).
    # Either alone can be wrong: a shopper whose request comes through clearcoat has clearcoat's remote.ip; a stranger
    # who reaches a PROXY listener can write any client.ip.
    if (remote.ip !~ purge || client.ip !~ purge) {
        return (synth(405, "Method not allowed"));
    }
    if (req.url == "/.clearcoat/probe") {
        return (synth(200, "Probe"));
    }

    # Everything. A ban on tags cannot reach objects without tags (files, pages of other applications).
    if (req.http.X-Clearcoat-Flush) {
        if (req.http.X-Clearcoat-Flush != "all") {
            return (synth(400, "X-Clearcoat-Flush: only the value all is known"));
        }
        set req.http.X-Ban = "obj.status != 0";
        call add_ban;
        return (synth(200, "Purged"));
    }

    # All bans are on obj.* alone, so that the ban lurker can work them off in the background.
    # Two headers of one name become one with a blank in it, and a blank is refused: it would end the pattern and start a
    # condition of its own ("x && req.url ~ y"), so that the purge removes less than its sender believes. Quotes would too.
    if (req.http.X-Magento-Tags-Pattern || req.http.X-Pool) {
        std.collect(req.http.X-Magento-Tags-Pattern);
        std.collect(req.http.X-Pool);
        if (req.http.X-Magento-Tags-Pattern && req.http.X-Magento-Tags-Pattern !~ "^[^\s\x22]+$") {
            return (synth(400, "X-Magento-Tags-Pattern: empty, or a blank or a quote in it"));
        }
        if (req.http.X-Pool && req.http.X-Pool !~ "^[^\s\x22]+$") {
            return (synth(400, "X-Pool: empty, or a blank or a quote in it"));
        }
        if (req.http.X-Magento-Tags-Pattern) {
            set req.http.X-Ban = "obj.http.X-Magento-Tags ~ " + req.http.X-Magento-Tags-Pattern;
            call add_ban;
        }
        if (req.http.X-Pool) {
            set req.http.X-Ban = "obj.http.X-Pool ~ " + req.http.X-Pool;
            call add_ban;
        }
        return (synth(200, "Purged"));
    }

    # "PURGE /" without a header purges nothing, and clearcoat asks it on purpose: 400 means "I would obey you".
    if (req.url == "/" || req.url == "*") {
        return (synth(400, "X-Magento-Tags-Pattern or X-Pool header required"));
    }
    if (req.url ~ "^/\.clearcoat(/|\?|$)") {
        return (synth(404, "Not found"));
    }

    # One URL. Not return (purge): that removes what this very request would hit, which is the plain http page for guests;
    # the https page and those of every X-Magento-Vary would stay. The ban takes them all.
    call strip_marketing;
    if (req.http.Host !~ "^[^\s\x22]+$") {
        return (synth(400, "Host header required"));
    }
    set req.http.X-Ban = "obj.http.X-Clearcoat-Url == " + req.url + " && obj.http.X-Clearcoat-Host == " + req.http.Host;
    call add_ban;
    return (synth(200, "Purged"));
}

# Adds the ban in X-Ban.
sub add_ban {
    # Only here: a ban that Varnish cannot compile is answered 400 and not "Purged".
    if (!std.ban(req.http.X-Ban)) {
        # A Varnish that is being stopped takes no more bans. That is no fault of the purge: try again, with the next one.
        if (std.ban_error() == "Shutting down") {
            return (synth(503, "Shutting down"));
        }
        return (synth(400, std.ban_error()));
    }
    # End of only here.
}

# Scripts in the browser read these parameters, the server does not. Left in the key, every mail and every advertisement
# would fill the cache with copies of one page. A name counts only as a whole. The list is that of edge.hash_ignore_query,
# by which clearcoat chooses the Varnish: `clearcoat vcl` writes it here.
sub strip_marketing {
    if (req.url ~ "\?") {
        # Each parameter with a "&" before it, so that the first one is no special case; then the separators put right.
        set req.url = regsub(req.url, "\?", "?&");
        set req.url = regsuball(req.url, "&(_branch_match_id|_bta_[^=&]*|_ga|_gl|_ke|_kx|campid|ceneo_cid|clickId|cof|customid|cx|dclid|dm_i|ef_id|epik|fbclid|gad_[^=&]*|gbraid|gclid|gclsrc|gdffi|gdfms|gdftrk|hsa_[^=&]*|igshid|matomo_[^=&]*|mc_[^=&]*|mkcid|mkevt|mkrid|mkwid|msclkid|mtm_[^=&]*|pcrid|piwik_[^=&]*|pk_[^=&]*|redirect_log_mongo_id|redirect_mongo_id|s_kwcid|sb_referer_host|ScCid|siteurl|snrai_[^=&]*|srsltid|tduid|trk_[^=&]*|ttclid|twclid|utm_[^=&]*|wbraid|yclid|zanpid)(=[^&]*)?(?=&|$)", "");
        set req.url = regsub(req.url, "\?&", "?");
        set req.url = regsub(req.url, "^([^?]*)\?$", "\1");
    }
}

# Varnish's own vcl_hash follows this one and adds the URL and the host.
sub vcl_hash {
    if (req.http.X-Forwarded-Proto == "https") {
        hash_data("https");
    }
    if (req.url ~ "^[^?]*/graphql/?(\?|$)") {
        hash_data("store " + req.http.Store);
        hash_data("currency " + req.http.Content-Currency);
        if (req.http.X-Magento-Cache-Id) {
            hash_data("id " + req.http.X-Magento-Cache-Id);
            # The id stays in the browser when the token is gone: then it must not get a customer's answers any more.
            if (req.http.Authorization ~ "(?i)^Bearer") {
                hash_data("signed in");
            }
        }
    }
    # Customer group, currency, store and so on, as one opaque value. GraphQL has its own: the cache id.
    if (req.http.Cookie ~ "(^|;\s*)X-Magento-Vary=" &&
        (req.url !~ "^[^?]*/graphql/?(\?|$)" || !req.http.X-Magento-Cache-Id)) {
        hash_data("vary " + regsub(req.http.Cookie, "^(?:.*?;\s*)?X-Magento-Vary=([^;]*).*$", "\1"));
    }
}

# The backend gets the Upgrade header only where recv has decided to pipe.
sub vcl_pipe {
    set bereq.http.Upgrade = req.http.Upgrade;
    set bereq.http.Connection = "Upgrade";
}

sub vcl_backend_fetch {
    # No revalidation of what is in the cache. A "304 Not Modified" would make a new object out of the old body, newer
    # than a ban that arrived meanwhile, so the ban would miss it; and a 304 has no tags, so clearcoat has to mark it
    # whatever was purged meanwhile.
    if (!bereq.uncacheable) {
        unset bereq.http.If-None-Match;
        unset bereq.http.If-Modified-Since;
    }
}

sub vcl_backend_response {
    # A failed refresh must not push out the page that is still good enough to be served.
    if (beresp.status >= 500 && bereq.is_bgfetch) {
        return (abandon);
    }

    # Magento fills some blocks of a page by ESI. Looking for them in anything but HTML is work for nothing.
    if (beresp.http.Content-Type ~ "^text/html") {
        set beresp.do_esi = true;
    }
    if (beresp.http.Content-Type ~ "^text/|javascript|json|xml|svg") {
        set beresp.do_gzip = true;
    }
    if (bereq.uncacheable) {
        return (deliver);
    }

    # clearcoat says so on a page whose tags were purged while it was rendered: it may be the page before the change, and
    # the ban, being older than the object, would never test it. Hit-for-miss, so that requests that wait for this fetch
    # get a fetch of their own, and the next good answer is cached again.
    if (beresp.http.Surrogate-Control ~ "(?i)no-store") {
        call hit_for_miss;
    }
    if (beresp.http.Cache-Control ~ "(?i)private|no-store|no-cache") {
        set beresp.uncacheable = true;
        set beresp.ttl = 86400s;
        return (deliver);
    }
    # Only good pages. A 404 has no tag of the product that will one day be there, so no purge would ever remove it.
    if (beresp.status != 200 || beresp.ttl <= 0s || beresp.http.Vary == "*") {
        call hit_for_miss;
    }
    # What was rendered for one signed-in client is for others only if it says so.
    if (bereq.http.Authorization && beresp.http.Cache-Control !~ "(?i)public|s-maxage") {
        call hit_for_miss;
    }
    # The answer belongs under another key than the one that was asked for.
    if (bereq.url ~ "^[^?]*/graphql/?(\?|$)" && bereq.http.X-Magento-Cache-Id &&
        bereq.http.X-Magento-Cache-Id != beresp.http.X-Magento-Cache-Id) {
        call hit_for_miss;
    }

    # A page in the cache is for everybody and sets nobody's cookie.
    if (beresp.http.Set-Cookie) {
        std.collect(beresp.http.Set-Cookie, "|");
        # Rendered for another X-Magento-Vary than the request had: same as above. Cookies that were joined to one line
        # cannot be taken apart again, so this one alone is kept: with it the client asks for the right page next time.
        if (beresp.http.Set-Cookie ~ "(^|\|)X-Magento-Vary=" &&
            (bereq.url !~ "^[^?]*/graphql/?(\?|$)" || !bereq.http.X-Magento-Cache-Id)) {
            set beresp.http.X-Vary-Now = regsub(beresp.http.Set-Cookie, "^(?:.*?\|)?X-Magento-Vary=([^;|]*).*$", "\1");
            unset beresp.http.X-Vary-Asked;
            if (bereq.http.Cookie ~ "(^|;\s*)X-Magento-Vary=") {
                set beresp.http.X-Vary-Asked = regsub(bereq.http.Cookie, "^(?:.*?;\s*)?X-Magento-Vary=([^;]*).*$", "\1");
            }
            if (beresp.http.X-Vary-Now != beresp.http.X-Vary-Asked) {
                set beresp.http.Set-Cookie = regsub(beresp.http.Set-Cookie, "^(?:.*?\|)?(X-Magento-Vary=[^|]*).*$", "\1");
                unset beresp.http.X-Vary-Now;
                unset beresp.http.X-Vary-Asked;
                call hit_for_miss;
            }
            unset beresp.http.X-Vary-Now;
            unset beresp.http.X-Vary-Asked;
        }
        unset beresp.http.Set-Cookie;
    }

    set beresp.grace = 3d;
    # For bans of one URL: a ban on req.url would keep the lurker out.
    set beresp.http.X-Clearcoat-Url = bereq.url;
    set beresp.http.X-Clearcoat-Host = bereq.http.Host;
    return (deliver);
}

# A fetch that failed. Varnish would answer everybody who waits for it with the same error, keep that for a second, and
# as a page in grace for five more: so the moment in which clearcoat is restarted would be one of several seconds.
sub vcl_backend_error {
    set beresp.uncacheable = true;
    set beresp.ttl = 1s;
    set beresp.grace = 0s;
}

# Not cached now, perhaps next time. Not hit-for-pass, which would keep a page out of the cache for the whole time.
sub hit_for_miss {
    set beresp.uncacheable = true;
    set beresp.ttl = 120s;
    return (deliver);
}

sub vcl_deliver {
    if (obj.uncacheable) {
        set resp.http.X-Magento-Cache-Debug = "UNCACHEABLE";
    } else if (obj.hits > 0) {
        set resp.http.X-Magento-Cache-Debug = "HIT";
    } else {
        set resp.http.X-Magento-Cache-Debug = "MISS";
    }

    # Nobody can purge a browser: it may keep files, whose names change with their content, but no page.
    if (resp.http.Cache-Control !~ "(?i)private" && req.url !~ "^/(pub/)?(media|static)/") {
        set resp.http.Cache-Control = "no-store, no-cache, must-revalidate, max-age=0";
        set resp.http.Pragma = "no-cache";
        set resp.http.Expires = "-1";
    }

    if (!resp.http.X-Magento-Debug) {
        unset resp.http.Age;
    }
    unset resp.http.X-Magento-Debug;
    unset resp.http.X-Magento-Tags;
    unset resp.http.X-Clearcoat-Url;
    unset resp.http.X-Clearcoat-Host;
    unset resp.http.Surrogate-Control;
    unset resp.http.X-Powered-By;
    unset resp.http.Server;
    unset resp.http.X-Varnish;
    unset resp.http.Via;
    unset resp.http.Link;
}

sub vcl_synth {
    set resp.http.Content-Type = "text/plain; charset=utf-8";
    if (resp.status == 405) {
        set resp.http.Allow = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS";
    }
    # So clearcoat knows that nothing of what was here is left: a VCL that does not know X-Clearcoat-Flush may answer 200, too.
    if (req.method == "PURGE" && req.http.X-Clearcoat-Flush == "all" && req.url != "/.clearcoat/probe" && resp.status == 200) {
        set resp.http.X-Clearcoat-Flushed = "all";
    }
    if (req.method == "PURGE" && req.url == "/.clearcoat/probe" && resp.status == 200) {
        set resp.http.Content-Type = "application/json";
        # Only here.
        synthetic({"{"vcl":"7","ban":"std.ban","clearcoat":1}"});
        # End of only here.
    } else {
        synthetic(resp.reason);
    }
    return (deliver);
}
