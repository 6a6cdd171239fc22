Feature: No key, no tokens

  @S70
  Scenario Outline: No key
    When I post an inference to the <part> without a key
    Then the status is 401 and the code is MISSING_API_KEY

    Examples:
      | part   |
      | queen  |
      | worker |

  @S71
  Scenario Outline: A wrong key
    When I post an inference to the <part> with a wrong key
    Then the status is 401 and the code is INVALID_API_KEY

    Examples:
      | part   |
      | queen  |
      | worker |

  @S70 @S71
  Scenario Outline: rbee-ctl is refused like anybody else and says where its key is set
    When I run rbee-ctl <key>
    Then the command ends with 1
    And standard error says "<code>"
    And standard error says "api_key_file"

    Examples:
      | key              | code            |
      | without a key    | MISSING_API_KEY |
      | with a wrong key | INVALID_API_KEY |
