-- The constants and random UUIDs of uuid-ossp. Versions 1, 3 and 5, which Dify does not use, are
-- not offered: calling them fails instead of answering something else.
CREATE FUNCTION uuid_generate_v4() RETURNS uuid
    VOLATILE STRICT PARALLEL SAFE LANGUAGE sql AS 'SELECT gen_random_uuid()';
CREATE FUNCTION uuid_nil() RETURNS uuid
    IMMUTABLE STRICT PARALLEL SAFE LANGUAGE sql
    AS $$SELECT '00000000-0000-0000-0000-000000000000'::uuid$$;
CREATE FUNCTION uuid_ns_dns() RETURNS uuid
    IMMUTABLE STRICT PARALLEL SAFE LANGUAGE sql
    AS $$SELECT '6ba7b810-9dad-11d1-80b4-00c04fd430c8'::uuid$$;
CREATE FUNCTION uuid_ns_url() RETURNS uuid
    IMMUTABLE STRICT PARALLEL SAFE LANGUAGE sql
    AS $$SELECT '6ba7b811-9dad-11d1-80b4-00c04fd430c8'::uuid$$;
