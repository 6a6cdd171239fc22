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
  Scenario: rbee-ctl with a wrong key says which file it took it from
    When I run rbee-ctl with a wrong key
    Then the command ends with 1
    And standard error says "INVALID_API_KEY"
    And standard error says "api_key_file"
